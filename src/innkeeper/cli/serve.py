"""`inn serve`: the server, in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from innkeeper.cli.connection import Target
from innkeeper.cli.printing import USAGE, fail, note

if TYPE_CHECKING:
    from innkeeper.settings import Settings


def serve(
    ctx: typer.Context,
    listen: Annotated[str | None, typer.Option(help="Address of the HTTP API.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the HTTP API.", show_default="7070")] = None,
    home: Annotated[Path | None, typer.Option(help="State directory.", show_default="/var/lib/innkeeper")] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Allow an address that is not loopback although the server speaks plain HTTP."),
    ] = False,
) -> None:
    """Run the server: the API process and the host daemon. Needs root; the API process drops it.

    Every other setting is an INNKEEPER_ variable of the environment.
    """
    settings = read_settings(ctx, home, listen=listen, port=port, insecure=insecure or None)
    from innkeeper.launch import serve as launch

    launch(settings)


def read_settings(ctx: typer.Context, home: Path | None, **overrides: object) -> Settings:
    """The settings of the environment and the options; ends the command with one line for each that is wrong."""
    from pydantic import ValidationError

    from innkeeper.settings import ENV_PREFIX, load_settings

    target: Target = ctx.obj
    try:
        return load_settings(home=home or target.home, **overrides)
    except ValidationError as error:
        # The input is left out: it may be a key.
        for one in error.errors(include_input=False, include_url=False):
            name = "_".join(str(part) for part in one["loc"])
            note(f"inn: {ENV_PREFIX}{name.upper()}: {one['msg']}")
        raise SystemExit(USAGE) from None
    except ValueError as error:
        fail(error, status=USAGE)
