"""`inn kernel`: what microVMs boot, on this host; without a server."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from innkeeper.cli.options import Config, Json
from innkeeper.cli.printing import fail, human_size, note, print_json, print_table, say
from innkeeper.cli.serve import read_settings

if TYPE_CHECKING:
    from innkeeper.host.kernels.kernel_store import Kernel, KernelStore
    from innkeeper.settings import Settings

Home = Annotated[Path | None, typer.Option(help="State directory.", show_default="/var/lib/innkeeper")]

app = typer.Typer(help="Kernels that microVMs boot, on this host. Needs root.", no_args_is_help=True)


@app.callback()
def kernel() -> None:
    """Kernels that microVMs boot, on this host. Needs root."""


@app.command()
def fetch(
    ctx: typer.Context,
    package: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PACKAGE]",
            help="A file linux-image-….deb, whose signature nobody checks here; default: the newest cloud kernel that apt knows, "
            "else the one of the package innkeeper-kernel.",
            show_default=False,
        ),
    ] = None,
    home: Home = None,
    config: Config = None,
) -> None:
    """Fetch the kernel for microVMs, unless it is here, and use it from now on.

    Nothing of the package is installed, and none of its scripts runs. A server uses it from its next start on.
    """
    import asyncio

    from innkeeper.host.kernels.kernel_package import KernelUnavailableError

    store, settings = _store(ctx, home, config)
    try:
        found = asyncio.run(_fetch(store, package))
    except (KernelUnavailableError, OSError) as error:
        fail(error)
    say(f"{found.name}  {human_size(found.size_bytes)}")
    _mind_the_server(settings)


async def _fetch(store: KernelStore, package: Path | None) -> Kernel:
    from innkeeper.host.kernels.kernel_package import KernelUnavailableError
    from innkeeper.shipped import ready_kernel

    try:
        return await store.fetch(progress=note, file=package)
    except KernelUnavailableError as error:
        brought = ready_kernel() if package is None else None
        if brought is None:
            raise
        note(f"{error}; taking the one that was brought along")
        return await store.fetch(progress=note, file=brought)


@app.command("list")
def list_(ctx: typer.Context, home: Home = None, config: Config = None, json: Json = False) -> None:
    """List the kernels; the last one is what new microVMs boot."""
    store, _ = _store(ctx, home, config)
    kernels = store.kernels()
    if json:
        print_json(
            [
                {
                    "name": one.name,
                    "release": one.package.release,
                    "size_bytes": one.size_bytes,
                    "fetched_at": _time(one),
                }
                for one in kernels
            ]
        )
        return
    print_table(
        ("NAME", "RELEASE", "SIZE", "FETCHED"),
        [(one.name, one.package.release, human_size(one.size_bytes), _time(one)[:19]) for one in kernels],
        empty="no kernels; fetch one with: inn kernel fetch",
    )


def _time(found: Kernel) -> str:
    return datetime.fromtimestamp(found.fetched_at, UTC).isoformat(timespec="seconds")


@app.command()
def rm(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `inn kernel list` shows it.")],
    home: Home = None,
    config: Config = None,
) -> None:
    """Remove a kernel. Saved memory of microVMs that booted it is restored no more; their disks start with another one.

    Refused while the server runs, which may be about to use it. `inn gc` removes old ones of a server that runs.
    """
    from innkeeper.host.leftovers import server_runs

    store, settings = _store(ctx, home, config)
    if server_runs(settings):
        fail("the server runs: stop it first, or let inn gc remove what it does not use")
    found = next((one for one in store.kernels() if one.name == name), None)
    if found is None:
        fail(f"there is no kernel {name!r}; see: inn kernel list")
    say(f"removed {found.name}, {human_size(store.remove(found))}")


def _store(ctx: typer.Context, home: Path | None, config: Path | None) -> tuple[KernelStore, Settings]:
    import logging

    import structlog

    from innkeeper.host.kernels.kernel_store import KernelStore

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    settings = read_settings(ctx, home, config).settings
    if os.geteuid() != 0:
        fail("inn kernel needs root: it works in the server's directories")
    return KernelStore(settings.host_dir), settings


def _mind_the_server(settings: Settings) -> None:
    from innkeeper.host.leftovers import server_runs

    if server_runs(settings):
        note("the server that runs uses it from its next start on; guests outlive that")
