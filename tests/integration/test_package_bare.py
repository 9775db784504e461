"""The packages in an empty machine: a bare Debian, where apt brings what they depend on, or where there is nothing but the bundle."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import image_fixture
from bare_root import apt_options, bare_root, debian_sources, from_setup
from isolated_root import IsolatedRoot, isolated_root

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to install packages and to run a server"),
    pytest.mark.long,
    pytest.mark.timeout(1800),
]
ROOT = Path(__file__).parents[2]
RESOLVING = {Path("/etc/resolv.conf"): "/etc/resolv.conf", Path("/etc/hosts"): "/etc/hosts"}
APT_SECONDS = 900
READY_IMAGES = "/usr/share/innkeeper/images"


def built(script: str, output: Path, **variables: str) -> Path:
    """What a script of setup builds, in a directory of the test's."""
    done = subprocess.run(
        [ROOT / "setup" / script, output], env={**os.environ, **variables}, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("package.sh", tmp_path_factory.mktemp("dist"))


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Where the changes to the root go, and the state directory of its server."""
    work, state = tmp_path / "work", tmp_path / "state"
    work.mkdir()
    state.mkdir()
    return work, state


@pytest.fixture
def ready_images(tmp_path: Path) -> Path:
    """The image `base`, built ahead."""
    return image_fixture.put_into(tmp_path / "ready", "base").directory


def connect_apt(root: IsolatedRoot) -> None:
    """Let apt inside use what this machine's apt uses now."""
    (root.files / "etc/apt/sources.list").write_text(debian_sources())
    (root.files / "etc/apt/apt.conf.d/90tests").write_text(apt_options())
    root.run("apt-get", "-qq", "update", timeout=APT_SECONDS)


def install(root: IsolatedRoot, *packages: str) -> None:
    """As an administrator does, with runsc from the backports where it is too old otherwise."""
    newest = 'if fresh_enough "$(candidate_release)"; then echo runsc; else echo runsc/$codename-backports; fi'
    (root.files / "tmp/apt.sh").write_text((ROOT / "setup" / "apt.sh").read_text())
    runsc = root.output("bash", "-c", f". /tmp/apt.sh; {newest}").strip()
    argv = ("apt-get", "-qq", "install", "--yes", "--no-install-recommends", *packages, runsc)
    root.run(*argv, timeout=APT_SECONDS, DEBIAN_FRONTEND="noninteractive")


def serves_a_room(root: IsolatedRoot) -> str:
    """Ask the doctor, serve, and run a command in a room; what the server said."""
    doctor = json.loads(root.output("inn", "doctor", "--json"))
    assert doctor["ok"], doctor
    root.configure(images="base")
    with root.serving() as log:
        said = root.output("inn", "run", "base", "first", "--", "sh", "-c", "uname; cat /etc/debian_version")
        assert said.startswith("Linux\n13.")
        log_text = log.read_text()
    assert "ending" in root.output("inn", "end-guests")
    return log_text


def has_no_network(root: IsolatedRoot) -> bool:
    return [line.split(":")[0].strip() for line in root.output("cat", "/proc/net/dev").splitlines()[2:]] == ["lo"]


def test_apt_installs_the_debian_package_into_a_bare_system(
    packages: Path, places: tuple[Path, Path], ready_images: Path
) -> None:
    work, state = places
    began = time.monotonic()
    bound = {packages: "/mnt", **RESOLVING}
    with isolated_root(work, state=state, root=bare_root(), bound=bound, network="host") as root:
        connect_apt(root)
        (deb,) = packages.glob("*.deb")
        assert not (root.files / "usr/bin/python3").exists()
        install(root, f"/mnt/{deb.name}")
        print(f"installed with all it depends on: {time.monotonic() - began:.0f} s")
    with isolated_root(work, state=state, root=bare_root(), bound={ready_images: READY_IMAGES}) as root:
        assert has_no_network(root)
        assert f"image base: taken from {READY_IMAGES}" in serves_a_room(root)
    print(f"a command in a room: {time.monotonic() - began:.0f} s")


def test_the_wheel_runs_in_an_environment_of_ones_own(
    packages: Path, places: tuple[Path, Path], ready_images: Path
) -> None:
    """With the Debian packages that the pages name and the wheels of the bundle, and no index."""
    work, state = places
    with isolated_root(work, state=state, root=bare_root(), bound=RESOLVING, network="host") as root:
        connect_apt(root)
        needed = from_setup('printf "%s " "${server_packages[@]}"').split()
        install(root, "python3-venv", *needed)
    bound = {packages: "/mnt/dist", ROOT / "build" / "wheels": "/mnt/wheels", ready_images: READY_IMAGES}
    with isolated_root(work, state=state, root=bare_root(), bound=bound) as root:
        assert has_no_network(root)
        root.run("python3", "-m", "venv", "/opt/innkeeper")
        pip = ("/opt/innkeeper/bin/pip", "install", "--no-index", "--find-links")
        root.run(*pip, "/mnt/wheels", "--find-links", "/mnt/dist", "innkeeper")
        root.run("ln", "-s", "/opt/innkeeper/bin/inn", "/usr/local/bin/inn")
        root.run("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "innkeeper")
        assert "useradd" in root.output("inn", "doctor")  # of virtual machines, which nothing demands
        serves_a_room(root)


def test_the_bundle_installs_without_any_network(tmp_path: Path, places: tuple[Path, Path], ready_images: Path) -> None:
    work, state = places
    bundle = built(
        "bundle.sh", tmp_path / "bundle", INNKEEPER_IMAGES="base", INNKEEPER_READY_IMAGES_DIR=str(ready_images)
    )
    (file,) = bundle.glob("*.bundle.tar")
    subprocess.run(["sha256sum", "--check", "--quiet", f"{file.name}.sha256"], cwd=bundle, check=True)
    print(f"{file.name}: {file.stat().st_size >> 20} MiB")
    began = time.monotonic()
    with isolated_root(work, state=state, root=bare_root(), bound={bundle: "/mnt"}) as root:
        assert has_no_network(root)
        for sources in (root.files / "etc/apt").glob("sources.list*"):
            root.run("rm", "-rf", f"/etc/apt/{sources.name}")
        root.run("tar", "--extract", "--directory", "/srv", "--file", f"/mnt/{file.name}")
        (unpacked,) = (root.files / "srv").glob("innkeeper-*-deb*")
        (victim,) = (unpacked / "wheels").glob("innkeeper-*.whl")
        whole = victim.read_bytes()
        victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused = root.run(f"/srv/{unpacked.name}/install.sh", expected=1)
        assert victim.name in refused.stdout + refused.stderr
        assert root.run("dpkg", "--status", "innkeeper", expected=1).stdout == ""
        victim.write_bytes(whole)
        # With a blank in its way, and from elsewhere.
        root.run("mv", f"/srv/{unpacked.name}", "/srv/the bundle")
        said = root.run("/srv/the bundle/install.sh", timeout=APT_SECONDS).stdout
        assert "innkeeper 0." in said
        inside = json.loads(root.output("inn", "doctor", "--json"))
        checks = {check["name"]: check for check in inside["checks"]}
        for name in ("qemu", "vm user", "guest kernel"):
            assert checks[name]["ok"] is True, checks[name]
        print(f"installed: {time.monotonic() - began:.0f} s")
        root.run("rm", "-rf", "/srv/the bundle")
        assert f"image base: taken from {READY_IMAGES}" in serves_a_room(root)
    print(f"a command in a room: {time.monotonic() - began:.0f} s")
