"""Building images for real: what is inside, what a failure, a cancellation and a kill leave behind (nothing)."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from innkeeper.host import temporary
from innkeeper.host.disks.image_build import ImageBuildFailed, build_image, is_current
from innkeeper.host.disks.image_store import ImageStore
from innkeeper.host.linux import mounts

sys.path.insert(0, str(Path(__file__).parent))
import image_fixture

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to build and mount images"),
    # The first one on a machine builds the base image.
    pytest.mark.timeout(900),
]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ImageStore]:
    store = image_fixture.put_into(tmp_path / "host", "base")
    yield store
    await store.unmount_all()
    await image_fixture.assert_nothing_mounted(tmp_path)
    assert processes_naming(tmp_path) == []


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe `small` on top of `base`, without packages, whose customize.sh a test writes."""
    shutil.copytree(image_fixture.RECIPES / "base", tmp_path / "recipes" / "base")
    small = tmp_path / "recipes" / "small"
    (small / "files" / "etc").mkdir(parents=True)
    (small / "files" / "etc" / "greeting").write_text("hello\n")
    (small / "recipe.toml").write_text('from = "base"\n[env]\nSMALL = "1"\n')
    return small


def processes_naming(path: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if os.fsencode(path) in line:
            found.append(line.decode(errors="replace"))
    return found


async def test_a_derived_image_is_built_once_and_rebuilt_when_its_recipe_changes(
    store: ImageStore, recipe: Path
) -> None:
    (recipe / "customize.sh").write_text("set -eu\necho made > /etc/made\nid -u user > /home/user/uid\n")
    said: list[str] = []
    record = await build_image(recipe, store, progress=said.append)
    assert said[0].startswith("image small: ")
    assert (record.env["SMALL"], record.env["LANG"], record.user) == ("1", "C.UTF-8", "user")
    root = store.mount(record.digest)
    assert (root / "etc/greeting").read_text() == "hello\n"
    assert (root / "etc/made").read_text() == "made\n"
    assert not (root / ".recipe").exists()
    assert (root / "home/user/uid").read_text() == "1000\n"

    said.clear()
    assert is_current(recipe, store)
    assert await build_image(recipe, store, progress=said.append) == record
    assert said == []

    (recipe / "customize.sh").write_text("echo other > /etc/made\n")
    assert not is_current(recipe, store)
    other = await build_image(recipe, store, progress=said.append)
    assert other.digest != record.digest
    assert store.get("small") == other


async def test_the_same_recipe_makes_the_same_bytes(store: ImageStore, recipe: Path) -> None:
    (recipe / "customize.sh").write_text("date > /dev/null; echo x > /etc/x; mkdir /srv/d\n")
    first = await build_image(recipe, store, progress=lambda _: None)
    (store.directory / "small.json").unlink()
    second = await build_image(recipe, store, progress=lambda _: None)
    assert first.digest == second.digest


@pytest.mark.long
@pytest.mark.timeout(3_600)
async def test_every_shipped_recipe_makes_the_same_bytes_twice(tmp_path: Path) -> None:
    """From nothing each time, the packages from the mirrors: twice the same files, unless the mirrors changed in between. Figures for docs/images.md."""
    recipes = sorted(path.parent.name for path in image_fixture.RECIPES.glob("*/recipe.toml"))
    found: list[dict[str, tuple[str, int]]] = []
    for time_of_building in ("first", "second"):
        store = ImageStore(tmp_path / time_of_building)
        try:
            made = {}
            for name in recipes:
                began = time.monotonic()
                record = await build_image(image_fixture.RECIPES / name, store, progress=lambda _: None)
                made[name] = (record.digest, record.path.stat().st_size)
                print(f"{name}: {record.digest[:12]}, {made[name][1] >> 20} MiB, {time.monotonic() - began:.0f} s")
        finally:
            await store.unmount_all()
        found.append(made)
    assert found[0] == found[1]
    await image_fixture.assert_nothing_mounted(tmp_path)


async def test_a_failing_customization_says_why_and_leaves_nothing(store: ImageStore, recipe: Path) -> None:
    (recipe / "customize.sh").write_text("echo 'no such thing as a free lunch' >&2\nexit 3\n")
    before = sorted(store.directory.iterdir())
    with pytest.raises(ImageBuildFailed, match=r"image small: exit status 3:\n.*free lunch"):
        await build_image(recipe, store, progress=lambda _: None)
    assert store.get("small") is None
    assert [path.name for path in sorted(store.directory.iterdir()) if path not in before] == [".small.lock"]


async def test_a_package_that_does_not_exist_is_named(store: ImageStore, recipe: Path) -> None:
    (recipe / "recipe.toml").write_text('from = "base"\npackages = ["no-such-package-here"]\n')
    with pytest.raises(ImageBuildFailed, match="no-such-package-here"):
        await build_image(recipe, store, progress=lambda _: None)


async def test_a_cancelled_build_leaves_nothing(store: ImageStore, recipe: Path) -> None:
    (recipe / "customize.sh").write_text("sleep 600 &\nexec sleep 601\n")
    customizing = asyncio.Event()
    building = asyncio.create_task(
        build_image(recipe, store, progress=lambda line: customizing.set() if "customizing" in line else None)
    )
    async with asyncio.timeout(60):
        await customizing.wait()
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert list(store.directory.glob(".build-*")) == []


async def test_a_killed_builder_leaves_only_what_the_next_start_sweeps(store: ImageStore, recipe: Path) -> None:
    (recipe / "customize.sh").write_text("echo ready > /etc/ready\nexec sleep 600\n")
    script = (
        "import asyncio, sys; from pathlib import Path\n"
        "from innkeeper.host.disks.image_build import build_image\n"
        "from innkeeper.host.disks.image_store import ImageStore\n"
        "asyncio.run(build_image(Path(sys.argv[1]), ImageStore(Path(sys.argv[2])), progress=lambda l: print(l, flush=True)))\n"
    )
    builder = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs on this loop
        [sys.executable, "-c", script, str(recipe), str(store.directory.parent)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert builder.stdout is not None
        for line in builder.stdout:
            if "customizing" in line:
                break
        builder.send_signal(signal.SIGKILL)
    finally:
        builder.kill()
        builder.wait()
        builder.stdout.close()
    async with asyncio.timeout(10):
        while processes_naming(store.directory):
            await asyncio.sleep(0.05)
    (left,) = temporary.abandoned(store.directory.parent)
    temporary.remove(left)
    assert list(store.directory.glob(".build-*")) == []
    (recipe / "customize.sh").unlink()
    assert (await build_image(recipe, store, progress=lambda _: None)).name == "small"


async def test_an_image_is_mounted_once_read_only_and_found_again(store: ImageStore) -> None:
    record = store.get("base")
    assert record is not None
    root = store.mount(record.digest)
    assert ImageStore(store.directory.parent).mount(record.digest) == root
    (mounted,) = mounts.mounts_under(store.mounts_directory)
    assert (mounted.fstype, {"ro", "nodev", "nosuid", "noatime"} - mounted.options) == ("erofs", set())
    with pytest.raises(OSError, match="Read-only"):
        (root / "x").touch()


async def test_nothing_of_the_build_host_is_inside(store: ImageStore) -> None:
    record = store.get("base")
    assert record is not None
    root = store.mount(record.digest)
    assert (root / "etc/resolv.conf").read_text() == ""
    assert (root / "etc/machine-id").read_text() == ""
    assert (root / "etc/hostname").read_text() == "innkeeper\n"
    sources = (root / "etc/apt/sources.list").read_text().split("\n")
    assert {line.split()[1] for line in sources if line} == {
        "http://deb.debian.org/debian",
        "http://deb.debian.org/debian-security",
    }
    assert sorted(path.name for path in (root / "etc/apt/sources.list.d").iterdir()) == []
    ours = {path.name for path in (image_fixture.RECIPES / "base/files/etc/apt/apt.conf.d").iterdir()}
    foreign = {path.name for path in (root / "etc/apt/apt.conf.d").iterdir()} - ours
    assert foreign <= {"01autoremove", "70debconf"}
    certificates = (root / "usr/local/share/ca-certificates").glob("**/*")
    assert [path for path in certificates if path.is_file()] == []
    for leftover in ("etc/ssh/ssh_host_rsa_key", "var/log/dpkg.log", "root/.bash_history", ".recipe", "dev/null"):
        assert not (root / leftover).exists()
    assert list((root / "var/lib/apt/lists").glob("*_Packages")) == []


async def test_the_base_image_is_laid_out_for_guests(store: ImageStore) -> None:
    record = store.get("base")
    assert record is not None
    root = store.mount(record.digest)
    assert any(tool.startswith("Python 3.") for tool in record.tools)
    assert (root / "usr/bin/sudo").readlink() == Path("/.innkeeper/bin/inn-agent")
    for directory, mode in (
        (".innkeeper", 0o755),
        (".innkeeper/bin", 0o755),
        (".innkeeper/link", 0o755),
        ("tmp", 0o1777),
    ):
        assert (root / directory).stat().st_mode & 0o7777 == mode
    assert [path.name for path in (root / "tmp").iterdir()] == [".innkeeper"]
    home = root / "home/user"
    assert {path.name for path in home.iterdir() if path.is_file()} == {".bash_logout", ".bashrc", ".profile"}
    assert all(path.lstat().st_uid == 1000 for path in (home, *home.rglob("*")))
    assert list(root.glob("usr/lib/python3.*/EXTERNALLY-MANAGED")) == []
