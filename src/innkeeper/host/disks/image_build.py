"""Builds the shipped images from their recipes: bootstrap or extend a tree, customize it, compress it, record it."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from innkeeper.host.disks.image_recipe import TREE_SCRIPT, Recipe, load_recipe, tool_versions
from innkeeper.host.disks.image_store import ImageRecord, ImageStore
from innkeeper.host.disks.package_lock import DEBIAN, LOCK, Mirrors, PackageLock, installed_packages, listed
from innkeeper.host.disks.ready_image import ReadyImageDamaged, file_digest, take_ready_image
from innkeeper.host.linux import command

# Of a 575 MB tree on two cores: lz4 in 4 KiB clusters 2.6 s and 341 MB, lz4hc 7.2 s and 310 MB, lz4 in 64 KiB clusters
# 1.5 s and 316 MB. Guests read through the page cache, so what counts is the build and the first, cold read.
EROFS_OPTIONS = "-zlz4 -C65536"
LET_GO_SCRIPT = Path(__file__).with_name("let_go.sh")
BUILD_TIMEOUT_SECONDS = 1800
TAIL_LINES = 15
# A step that says nothing for longer than this looks as if it hung.
REMIND_SECONDS = 5.0
REMINDER_CHARACTERS = 100
# The host's way to the outside, where it is said by environment and not in the settings of apt, npm and pip.
OUTSIDE_VARIABLES = (
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "NPM_CONFIG_REGISTRY", "npm_config_registry", "NPM_CONFIG_CAFILE", "npm_config_cafile", "NODE_EXTRA_CA_CERTS",
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT", "PIP_TRUSTED_HOST",
)  # fmt: skip


class ImageBuildFailed(RuntimeError):  # noqa: N818  # reads as a sentence where it is raised
    """An image could not be built; the message ends with what the tools said last."""

    code = "image_build_failed"


def is_current(recipe_dir: Path, store: ImageStore) -> bool:
    """Whether the store holds the image of exactly this recipe. A few milliseconds. Raises RecipeInvalid."""
    recipe = load_recipe(recipe_dir)
    record = store.get(recipe.name)
    return record is not None and record.recipe_digest == recipe.digest


async def build_image(
    recipe_dir: Path, store: ImageStore, *, progress: Callable[[str], None], ready_images: Path | None = None
) -> ImageRecord:
    """The image of a recipe: the one in the store when it is current, else a ready-made one, else built now, its parents first.

    `progress` gets one short line per step. Cancelling it kills the build; nothing of it stays behind, whatever ends it.
    Raises RecipeInvalid, ImageBuildFailed; OSError from the state directory.
    """
    return await _build(load_recipe(recipe_dir), store, progress, ready_images)


async def lock_image(
    recipe_dir: Path, store: ImageStore, *, progress: Callable[[str], None], mirrors: Mirrors = DEBIAN
) -> ImageRecord:
    """Build the image of what the mirrors have now, whatever is in the store, and write that down as the recipe's lock.

    Raises as build_image; OSError when the recipe's folder cannot be written.
    """
    free = replace(load_recipe(recipe_dir), lock=None)
    parent = await _build(free.parent, store, progress, None) if free.parent else None
    async with store.build_lock(free.name):
        with store.workspace() as work:
            taken = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
            record = await _build_in(work, free, parent, progress, mirrors)
            lock = PackageLock(
                architecture=_architecture(work),
                taken=taken,
                source_date_epoch=int((work / "epoch").read_text()),
                mirrors=mirrors,
                packages=installed_packages((work / "dpkg-status").read_text(errors="replace")),
            )
            fresh = recipe_dir / f"{LOCK}.new"
            fresh.write_text(lock.text())
            fresh.replace(recipe_dir / LOCK)
            return await asyncio.to_thread(store.add, replace(record, recipe_digest=load_recipe(recipe_dir).digest))


async def _build(
    recipe: Recipe, store: ImageStore, progress: Callable[[str], None], ready_images: Path | None
) -> ImageRecord:
    record = store.get(recipe.name)
    if record is not None and record.recipe_digest == recipe.digest:
        return record
    async with store.build_lock(recipe.name):
        # Somebody else may have built it while we waited.
        record = store.get(recipe.name)
        if record is not None and record.recipe_digest == recipe.digest:
            return record
        if ready_images is not None:
            try:
                record = await take_ready_image(recipe, ready_images, store)
            except (ReadyImageDamaged, command.CommandFailed) as error:
                raise ImageBuildFailed(f"image {recipe.name}: {error}") from error
            if record is not None:
                progress(f"image {recipe.name}: taken from {ready_images}")
                return record
        parent = await _build(recipe.parent, store, progress, ready_images) if recipe.parent else None
        with store.workspace() as work:
            record = await _build_in(work, recipe, parent, progress, DEBIAN)
            return await asyncio.to_thread(store.add, record)


async def _build_in(
    work: Path, recipe: Recipe, parent: ImageRecord | None, progress: Callable[[str], None], mirrors: Mirrors
) -> ImageRecord:
    """The image built in `work`, and not yet in a store. A lock of the recipe says which packages, and then which mirrors."""
    (work / "plan.sh").write_text(plan_text(recipe, parent.path if parent else None, mirrors))
    if recipe.lock is not None:
        (work / "preferences").write_text(recipe.lock.preferences())
    await _build_tree(recipe.name, work, progress)
    status = (work / "dpkg-status").read_text(errors="replace")
    if recipe.lock is not None:
        _check_lock(recipe.name, recipe.lock, status, _architecture(work))
    image = work / "image.erofs"
    return ImageRecord(
        name=recipe.name,
        digest=await asyncio.to_thread(file_digest, image),
        recipe_digest=recipe.digest,
        size_bytes=image.stat().st_size,
        user=recipe.user,
        workdir=recipe.workdir,
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        path=image,
        env=recipe.env,
        tools=tool_versions(recipe.tools, status),
    )


def _check_lock(name: str, lock: PackageLock, dpkg_status: str, architecture: str) -> None:
    if lock.architecture != architecture:
        raise ImageBuildFailed(f"image {name}: {LOCK} is for {lock.architecture}, this host is {architecture}")
    if differences := lock.differences(installed_packages(dpkg_status)):
        raise ImageBuildFailed(f"image {name}: not the packages of {LOCK}:\n{listed(differences)}")


def _architecture(work: Path) -> str:
    return (work / "architecture").read_text().strip()


def plan_text(recipe: Recipe, parent: Path | None, mirrors: Mirrors = DEBIAN) -> str:
    """The shell assignments that image_tree.sh reads."""
    lock = recipe.lock
    source = lock.mirrors if lock else mirrors
    values = {
        "recipe": recipe.directory.resolve(),
        # Whose pip fetches the packages of a lock: the server's own environment has one.
        "python": sys.executable,
        "suite": recipe.suite,
        "mirror": source.main,
        "security_mirror": source.security,
        # Lists of another day are past their date by intention.
        "source_options": "[check-valid-until=no] " if lock or mirrors != DEBIAN else "",
        "epoch": lock.source_date_epoch if lock else "",
        "parent": parent or "",
        "erofs_options": EROFS_OPTIONS,
        "uuid": uuid.uuid5(uuid.NAMESPACE_OID, recipe.identity),
    }
    lines = [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    return "\n".join([*lines, f"packages=({shlex.join(recipe.packages)})", ""])


def build_argv(work: Path) -> list[str]:
    """The command that builds: namespaces of its own, so that nothing it mounts or starts outlives it, or outlives us."""
    return [
        "setpriv", "--pdeathsig", "KILL", "--",
        "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL",
        "bash", str(LET_GO_SCRIPT), str(work.parent.parent), "bash", str(TREE_SCRIPT), str(work),
    ]  # fmt: skip


def build_environment(outside: Mapping[str, str]) -> dict[str, str]:
    """The environment of a build: minimal, and the host's proxies and registries where `outside` names some."""
    kept = {name: outside[name] for name in OUTSIDE_VARIABLES if name in outside}
    return {**command.MINIMAL_ENVIRONMENT, **kept}


class _Told:
    """What people are told of a build: each step, and every few seconds of a long one how long it has taken and what its tool said last."""

    def __init__(self, name: str, tail: deque[str], progress: Callable[[str], None]) -> None:
        self._name = name
        self._tail = tail
        self._progress = progress
        self._step = "preparing"
        self._began = time.monotonic()

    def step(self, text: str) -> None:
        """The next step begins."""
        self._step, self._began = text, time.monotonic()
        self._tail.clear()
        self._progress(f"image {self._name}: {text}")

    async def remind(self) -> None:
        """Say every few seconds that the step is still going on, until cancelled."""
        while True:
            await asyncio.sleep(REMIND_SECONDS)
            seconds = time.monotonic() - self._began
            if seconds >= REMIND_SECONDS:
                last = f": {self._tail[-1][:REMINDER_CHARACTERS]}" if self._tail else ""
                self._progress(f"image {self._name}: {self._step}, {seconds:.0f} s so far{last}")


async def _build_tree(name: str, work: Path, progress: Callable[[str], None]) -> None:
    process = await command.spawn(
        build_argv(work),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=build_environment(os.environ),
    )
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    told = _Told(name, tail, progress)
    reminding = asyncio.get_running_loop().create_task(told.remind())
    try:
        async with asyncio.timeout(BUILD_TIMEOUT_SECONDS):
            assert process.stdout is not None  # noqa: S101  # asked for above
            async for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip()
                if line.startswith("> "):
                    told.step(line[2:])
                elif line:
                    tail.append(line)
            status = await process.wait()
    except TimeoutError:
        raise ImageBuildFailed(f"image {name}: not built within {BUILD_TIMEOUT_SECONDS} s") from None
    finally:
        reminding.cancel()
        await asyncio.shield(command.end(process))
    if status != 0:
        raise ImageBuildFailed(f"image {name}: {command.describe_status(status)}:\n" + "\n".join(tail))
