"""The packages as `make package` builds them: the same bytes twice, and a server that runs from the installed one.

What is installed here lands in a copy of this machine's root that is forgotten afterwards, without a network; test_package_bare.py begins
with an empty directory.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import image_fixture
from isolated_root import isolated_root

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to install packages and to run a server"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).parents[2]
SITE = "usr/lib/innkeeper/lib/python3.{minor}/site-packages"


def build(checkout, output, *, umask=0o022, **variables):
    done = subprocess.run(
        [checkout / "setup" / "package.sh", output],
        cwd="/",
        env={**os.environ, **variables},
        umask=umask,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (deb,) = output.glob("*.whl"), output.glob("*.deb")
    return wheel, deb


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def deb(packages):
    return packages[1]


@pytest.fixture(scope="module")
def unpacked(deb, tmp_path_factory):
    """What the Debian package holds, with its control files in DEBIAN."""
    directory = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["dpkg-deb", "--raw-extract", deb, directory], check=True)
    return directory


@pytest.fixture(scope="module")
def site(unpacked):
    (found,) = unpacked.glob(SITE.format(minor="*"))
    return found


def control(deb, field):
    return subprocess.run(
        ["dpkg-deb", "--field", deb, field], check=True, capture_output=True, text=True
    ).stdout.strip()


def newer(unpacked, directory):
    """The same package with a higher version."""
    tree = directory / "newer"
    shutil.copytree(unpacked, tree, symlinks=True)
    text = (tree / "DEBIAN" / "control").read_text()
    (tree / "DEBIAN" / "control").write_text(text.replace("-1~deb", "-2~deb"))
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, directory], check=True)
    shutil.rmtree(tree)
    (built,) = directory.glob("*.deb")
    return built


def test_the_same_sources_make_the_same_bytes(packages, tmp_path):
    """In another folder, at another time, by a shell with another mask."""
    elsewhere = tmp_path / "somewhere-else"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.decode().split("\0")):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, elsewhere / name)
        (elsewhere / name).chmod(0o700 if os.access(ROOT / name, os.X_OK) else 0o600)
    (elsewhere / ".venv").symlink_to(ROOT / ".venv")
    (elsewhere / "build").mkdir()
    (elsewhere / "build" / "wheels").symlink_to(ROOT / "build" / "wheels")
    commit = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, check=True, capture_output=True, text=True)
    again = build(elsewhere, tmp_path / "dist", umask=0o077, SOURCE_DATE_EPOCH=commit.stdout.strip())
    for first, second in zip(packages, again, strict=True):
        assert (first.name, first.read_bytes() == second.read_bytes()) == (second.name, True)


def test_it_depends_on_what_a_checkout_installs(deb, unpacked):
    depends = {one.split()[0] for one in control(deb, "Depends").split(", ")}
    lists = subprocess.run(
        ["bash", "-c", '. setup/apt.sh; printf "%s\\n" "${server_packages[@]}"'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert set(lists.stdout.split()) < depends
    runsc, *microvms = control(deb, "Recommends").split(", ")
    assert runsc.startswith("runsc (>= 0.0~2023")
    assert microvms == (["qemu-system-x86"] if control(deb, "Architecture") == "amd64" else [])
    # What its binaries are linked with is the C library's and nothing else's.
    needed = set()
    for binary in unpacked.rglob("*.so*"):
        said = subprocess.run(["readelf", "--dynamic", binary], capture_output=True, text=True)
        needed |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", said.stdout))
    assert needed <= {
        "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1",
        f"ld-linux-{os.uname().machine.replace('_', '-')}.so.2",
    }  # fmt: skip


def test_every_dependency_is_in_it_as_locked(site):
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "setup" / "requirements.lock").read_text(), re.MULTILINE))
    inside = dict(path.name.removesuffix(".dist-info").split("-") for path in site.glob("*.dist-info"))
    inside = {name.lower().replace("_", "-"): version for name, version in inside.items()}
    for requirement in wanted:
        name = re.match(r"[a-z0-9-]+", requirement)[0]
        assert inside[name] == locked[name]


def test_nothing_tells_where_it_was_built(unpacked):
    said = subprocess.run(["grep", "--recursive", "--files-with-matches", str(ROOT), unpacked], capture_output=True)
    assert said.stdout == b""
    assert not [path for path in unpacked.rglob("*") if path.name in {"direct_url.json", "RECORD"}]


def test_what_may_be_kept_from_others_is(deb, unpacked):
    listing = subprocess.run(["dpkg-deb", "--contents", deb], check=True, capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=5) for line in listing.splitlines()]
    assert {row[1] for row in rows} == {"root/root"}
    modes = {row[5].split(" -> ")[0].removeprefix("./"): row[0] for row in rows}
    assert modes["etc/innkeeper/environment"] == "-rw-------"
    assert not [name for name, mode in modes.items() if "s" in mode or (mode[8] == "w" and mode[0] != "l")]
    assert (unpacked / "DEBIAN" / "conffiles").read_text().split() == [
        f"/{name}" for name in sorted(modes) if name.startswith("etc/") and not name.endswith("/")
    ]


def test_the_recipes_and_pages_are_in_both(packages, site, unpacked):
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "images").rglob("*") if path.is_file()}
    assert {str(path.relative_to(site / "innkeeper/shipped")) for path in (site / "innkeeper/shipped/images").rglob("*") if path.is_file()} == here  # fmt: skip
    with zipfile.ZipFile(packages[0]) as wheel:
        names = wheel.namelist()
    assert {name.removeprefix("innkeeper/shipped/") for name in names if "shipped/images/" in name} == here
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert {path.name for path in (unpacked / "usr/share/doc/innkeeper/docs").glob("*.md")} == pages


def test_a_server_runs_from_it_and_guests_outlive_its_upgrade(deb, unpacked, tmp_path):
    """Install, serve, run a command, upgrade under a running guest, remove, purge; figures of how long each takes are printed."""
    state, work, more = (tmp_path / name for name in ("state", "work", "more"))
    for directory in (state, work, more):
        directory.mkdir()
    image_fixture.put_into(state / "host", "base")
    newer(unpacked, more)
    began = time.monotonic()

    def took(what):
        nonlocal began
        print(f"{what}: {time.monotonic() - began:.1f} s")
        began = time.monotonic()

    with isolated_root(work, state=state, bound={deb.parent: "/mnt/old", more: "/mnt/new"}) as root:
        root.run("sh", "-c", "userdel innkeeper; userdel innkeeper-vm; dpkg --install /mnt/old/*.deb")
        assert root.output("sh", "-c", "cd / && inn version") == f"innkeeper {control(deb, 'Version').split('-')[0]}\n"
        assert root.output("dpkg", "--verify", "innkeeper") == ""
        wanted = root.files / "etc/systemd/system/multi-user.target.wants"
        assert {path.name for path in wanted.glob("innkeeper*")} == {"innkeeper.service", "innkeeper-guests.service"}
        assert len(set(root.output("id", "--user", "innkeeper", "innkeeper-vm").split())) == 2
        took("install")
        settings = root.configure(images="base")
        doctor = json.loads(root.output("inn", "doctor", "--json"))
        assert doctor["ok"]
        took("inn doctor")
        with root.serving():
            assert (
                root.output(
                    "inn",
                    "run",
                    "base",
                    "first",
                    "--",
                    "sh",
                    "-c",
                    "uname; sleep 1000 > /dev/null 2>&1 & echo $! > pid",
                )
                == "Linux\n"
            )
            took("serve, and a command in a room")
            assert sandboxes_of(root)
            # As at an upgrade by apt: the new files arrive under the running server, and then it starts again.
            root.run("sh", "-c", "dpkg --install --force-confold /mnt/new/*.deb")
            assert (root.files / "etc/innkeeper/innkeeper.toml").read_text() == settings
        with root.serving():
            assert (
                root.output("inn", "run", "base", "first", "--", "sh", "-c", 'kill -0 "$(cat pid)" && echo alive')
                == "alive\n"
            )
            took("upgrade")
        # Nothing of Python's may have been written into what dpkg owns.
        assert root.output("dpkg", "--verify", "innkeeper").split() == [
            "??5??????",
            "c",
            "/etc/innkeeper/innkeeper.toml",
        ]
        assert "ending" in root.output("dpkg", "--remove", "innkeeper")
        assert sandboxes_of(root) == set()
        assert root.output("findmnt", "--noheadings", "--list", "--output", "TARGET").count(root.home) == 1
        took("remove")
        for kept in ("first-token", "api/innkeeper.db", "host/disks", "host/images"):
            assert (state / kept).exists() or kept == "host/disks", kept
        assert not (root.files / "usr/lib/innkeeper").exists()
        assert (root.files / "etc/innkeeper/innkeeper.toml").exists()
        (root.files / "var/lib/innkeeper/host").mkdir(parents=True)
        root.run("dpkg", "--purge", "innkeeper")
        assert root.run("getent", "passwd", "innkeeper", "innkeeper-vm", expected=2).stdout == ""
        assert not [path for path in ("etc/innkeeper", "var/lib/innkeeper") if (root.files / path).exists()]
        assert not list(wanted.glob("innkeeper*"))


def sandboxes_of(root):
    """The pids of the guests' sandboxes inside."""
    said = root.run("pgrep", "--full", "^runsc-sandbox", expected=None)
    return set(said.stdout.split())
