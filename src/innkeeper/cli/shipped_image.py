"""`inn image build-shipped` and `inn agent build`: images of recipes, built on this host without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from innkeeper.cli.options import Config
from innkeeper.cli.printing import FAILED, fail, human_size, note, say
from innkeeper.cli.serve import read_settings

if TYPE_CHECKING:
    from innkeeper.settings import Settings

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME]...", help="Shipped images; default: the ones that the server would build."),
]


def build_shipped(
    ctx: typer.Context,
    names: Names = None,
    lock: Annotated[
        bool,
        typer.Option(
            "--lock", help="Build of what the mirrors have now, and write packages.lock into each recipe's folder."
        ),
    ] = False,
    mirror: Annotated[
        str | None, typer.Option(help="With --lock: the mirror.", show_default="http://deb.debian.org/debian")
    ] = None,
    security_mirror: Annotated[
        str | None,
        typer.Option(
            help="With --lock: the mirror of security updates.", show_default="http://deb.debian.org/debian-security"
        ),
    ] = None,
    home: Annotated[Path | None, typer.Option(help="State directory.", show_default="/var/lib/innkeeper")] = None,
    config: Config = None,
) -> None:
    """Build shipped images into the state directory, as a server does at its start. Needs root.

    A recipe with a packages.lock is built of exactly the packages named there, or not at all.
    """
    import asyncio

    from innkeeper import shipped
    from innkeeper.host.disks.image_build import ImageBuildFailed, build_image, lock_image
    from innkeeper.host.disks.image_recipe import RecipeInvalid, recipe_folder
    from innkeeper.host.disks.image_store import ImageRecord, ImageStore
    from innkeeper.host.disks.package_lock import DEBIAN, LockInvalid, Mirrors, checked_mirror

    settings, recipes = _prepare(ctx, home, config)
    if (mirror or security_mirror) and not lock:
        fail("--mirror and --security-mirror go with --lock: without it the lock of a recipe names them")

    async def build(name: str) -> ImageRecord:
        folder = recipe_folder(recipes, name)
        if lock:
            return await lock_image(folder, store, progress=note, mirrors=mirrors)
        return await build_image(folder, store, progress=note, ready_images=shipped.ready_images(settings))

    try:
        mirrors = Mirrors(checked_mirror(mirror or DEBIAN.main), checked_mirror(security_mirror or DEBIAN.security))
        store = ImageStore(settings.host_dir)
        for name in names or [name for name in settings.images.split(",") if name]:
            record = asyncio.run(build(name))
            say(f"{record.name}  {record.digest}  {human_size(record.size_bytes)}")
    except (ImageBuildFailed, RecipeInvalid, LockInvalid, OSError) as error:
        _say_why(error)
        raise SystemExit(FAILED) from None


def build_agents(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[AGENT]...", help="Agents; default: all that can be built.")
    ] = None,
    home: Annotated[Path | None, typer.Option(help="State directory.", show_default="/var/lib/innkeeper")] = None,
    config: Config = None,
) -> None:
    """Build agents' images into the state directory, of exactly the packages of their locks. Needs root, the network, and npm for some.

    A server that runs on the state directory lists them the next time that it is asked.
    """
    import asyncio

    from innkeeper import shipped
    from innkeeper.host.agent_recipes import load_agents
    from innkeeper.host.disks.image_build import ImageBuildFailed, build_image
    from innkeeper.host.disks.image_recipe import RecipeInvalid, recipe_folder
    from innkeeper.host.disks.image_store import ImageStore

    settings, recipes = _prepare(ctx, home, config)
    agents = {agent.id: agent for agent, _ in load_agents(recipes).values()}
    if unknown := [name for name in names or () if name not in agents]:
        fail(f"there is no agent {unknown[0]!r}: see inn agent list")
    failed = False
    for name in names or [agent.id for agent in agents.values() if agent.unavailable is None]:
        if (reason := agents[name].unavailable) is not None:
            fail(f"{name} cannot be built: {reason}")
        folder, store = recipe_folder(recipes, name), ImageStore(settings.host_dir)
        try:
            record = asyncio.run(build_image(folder, store, progress=note, ready_images=shipped.ready_images(settings)))
        except (ImageBuildFailed, RecipeInvalid, OSError) as error:
            # The others are of use without it.
            _say_why(error)
            failed = True
        else:
            say(f"{record.name}  {record.digest}  {human_size(record.size_bytes)}")
    if failed:
        raise SystemExit(FAILED)


def _prepare(ctx: typer.Context, home: Path | None, config: Path | None) -> tuple[Settings, Path]:
    """The settings, and the folder of recipes."""
    import logging
    import os

    import structlog

    from innkeeper import shipped

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    settings = read_settings(ctx, home, config).settings
    recipes = shipped.recipes(settings)
    if os.geteuid() != 0:
        fail("building images needs root")
    if recipes is None:
        fail("the image recipes are missing")
    return settings, recipes


def _say_why(error: Exception) -> None:
    # What the tools said last, or the packages that differ, line by line.
    for line in str(error).splitlines():
        note(f"inn: {line}")
