"""Shipped images by their locks, and ones that were built elsewhere: real builds, from real mirrors."""

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from innkeeper.host.disks.image_build import ImageBuildFailed, build_image, is_current, lock_image
from innkeeper.host.disks.image_recipe import load_recipe
from innkeeper.host.disks.image_store import ImageStore
from innkeeper.host.disks.package_lock import LOCK, load_lock

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
    yield image_fixture.put_into(tmp_path / "host", "base")
    await image_fixture.assert_nothing_mounted(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe `small` on top of `base`, of one package."""
    shutil.copytree(image_fixture.RECIPES / "base", tmp_path / "recipes" / "base")
    small = tmp_path / "recipes" / "small"
    small.mkdir()
    (small / "recipe.toml").write_text('from = "base"\npackages = ["hello"]\n[tools]\nhello = "hello"\n')
    return small


def quiet(line: str) -> None:
    """Nobody looks at the progress."""


async def test_a_lock_makes_the_bytes_again_that_it_was_written_for_or_names_what_differs(
    store: ImageStore, recipe: Path
) -> None:
    locked = await lock_image(recipe, store, progress=quiet)
    lock = load_lock(recipe / LOCK)
    assert lock is not None
    assert {"hello", "bash", "python3"} <= lock.packages.keys()
    assert locked.tools[-1] == f"hello {lock.packages['hello'].split('-')[0]}"
    assert is_current(recipe, store)
    (store.directory / "small.json").unlink()
    assert (await build_image(recipe, store, progress=quiet)).digest == locked.digest

    lines = [line for line in lock.text().splitlines() if not line.startswith('"hello"')]
    (recipe / LOCK).write_text("\n".join([*lines, '"hello" = "1.0-1"', '"no-such-package" = "2"']))
    assert not is_current(recipe, store)
    with pytest.raises(ImageBuildFailed) as caught:
        await build_image(recipe, store, progress=quiet)
    said = str(caught.value).splitlines()
    assert said[0] == f"image small: not the packages of {LOCK}:"
    assert said[1].startswith("hello: locked at 1.0-1, the mirror has 2.")
    assert said[2:] == ["no-such-package: locked at 2, and not installed"]
    assert list(store.directory.glob(".build-*")) == []


async def test_an_image_that_was_built_elsewhere_is_taken_in_place_of_a_build(tmp_path: Path, recipe: Path) -> None:
    elsewhere = image_fixture.put_into(tmp_path / "elsewhere", "base").directory
    here = ImageStore(tmp_path / "here")
    said: list[str] = []
    base = recipe.parent / "base"
    record = await build_image(base, here, progress=said.append, ready_images=elsewhere)
    assert said == [f"image base: taken from {elsewhere}"]
    assert record.recipe_digest == load_recipe(base).digest
    assert record.path.parent == here.directory
    # Of another recipe it is not the image.
    (base / "files" / "etc" / "motd").write_text("changed\n")
    assert not is_current(base, here)
    (base / "customize.sh").write_text("exit 7\n")
    (base / "recipe.toml").write_text('suite = "no-such-suite"\n')
    with pytest.raises(ImageBuildFailed):
        await build_image(base, here, progress=said.append, ready_images=elsewhere)
    assert said[1].startswith("image base: bootstrapping Debian no-such-suite")


async def test_a_damaged_one_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    elsewhere = image_fixture.put_into(tmp_path / "elsewhere", "base")
    record = elsewhere.get("base")
    assert record is not None
    content = record.path.read_bytes()
    # Not through the name: it is a link to the image that all tests share.
    record.path.unlink()
    record.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    here = ImageStore(tmp_path / "here")
    with pytest.raises(ImageBuildFailed, match="its bytes are not those of its name"):
        await build_image(image_fixture.RECIPES / "base", here, progress=quiet, ready_images=elsewhere.directory)
    assert [path.name for path in here.directory.iterdir()] == [".base.lock"]


def test_the_command_says_what_it_built_and_what_is_wrong(tmp_path: Path) -> None:
    ready = image_fixture.put_into(tmp_path / "elsewhere", "base")
    record = ready.get("base")
    assert record is not None

    def build(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("inn"), "image", "build-shipped", "--home", tmp_path / "home", *argv],
            env={
                "PATH": os.environ["PATH"],
                "INNKEEPER_READY_IMAGES_DIR": str(ready.directory),
                "INNKEEPER_CONFIG": "",
            },
            capture_output=True,
            text=True,
        )

    done = build("base")
    assert done.stdout.split()[:2] == ["base", record.digest]
    assert done.stderr == f"image base: taken from {ready.directory}\n"
    assert ImageStore(tmp_path / "home" / "host").get("base") is not None
    for argv, why in (
        (("base", "--mirror", "http://deb.debian.org/debian"), "go with --lock"),
        (("base", "--lock", "--mirror", "gopher://x"), "not the address of a mirror: 'gopher://x'"),
        (("no-such-image",), "no such recipe"),
    ):
        failed = build(*argv)
        assert (failed.returncode, why in failed.stderr) == (1, True), failed.stderr
