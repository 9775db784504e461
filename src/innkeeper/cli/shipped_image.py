"""`inn image build-shipped`: the shipped images, built on this host without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from innkeeper.cli.options import Config
from innkeeper.cli.printing import FAILED, fail, human_size, note, say
from innkeeper.cli.serve import read_settings

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
    import logging
    import os

    import structlog

    from innkeeper import shipped
    from innkeeper.host.disks.image_build import ImageBuildFailed, build_image, lock_image
    from innkeeper.host.disks.image_recipe import RecipeInvalid, recipe_folder
    from innkeeper.host.disks.image_store import ImageRecord, ImageStore
    from innkeeper.host.disks.package_lock import DEBIAN, LockInvalid, Mirrors, checked_mirror

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    settings = read_settings(ctx, home, config).settings
    recipes = shipped.recipes(settings)
    if os.geteuid() != 0:
        fail("building images needs root")
    if recipes is None:
        fail("the image recipes are missing")
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
        # What the tools said last, or the packages that differ, line by line.
        for line in str(error).splitlines():
            note(f"inn: {line}")
        raise SystemExit(FAILED) from None
