"""`inn serve`: the server, in the foreground; `inn end-guests`: what it left running."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from innkeeper.cli.connection import Target
from innkeeper.cli.options import Config
from innkeeper.cli.printing import USAGE, fail, note
from innkeeper.settings_file import find_settings_file

if TYPE_CHECKING:
    from innkeeper.settings_sources import SettingsOrigin


def serve(
    ctx: typer.Context,
    listen: Annotated[str | None, typer.Option(help="Address of the HTTP API.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the HTTP API.", show_default="7070")] = None,
    home: Annotated[Path | None, typer.Option(help="State directory.", show_default="/var/lib/innkeeper")] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Allow an address that is not loopback although the server speaks plain HTTP."),
    ] = False,
    config: Config = None,
) -> None:
    """Run the server: the API process and the host daemon. Needs root; the API process drops it.

    Every other setting is an INNKEEPER_ variable of the environment or an entry of the settings file.
    """
    origin = read_settings(ctx, home, config, listen=listen, port=port, insecure=insecure or None)
    from innkeeper.launch import serve as launch

    launch(origin.settings)


def end_guests(
    ctx: typer.Context,
    home: Annotated[Path | None, typer.Option(help="State directory.", show_default="/var/lib/innkeeper")] = None,
    config: Config = None,
) -> None:
    """End the guests that a server left running when it stopped, and release all they hold. Needs root.

    Their disks stay: a room starts again when it is next used. Refused while the server runs.
    """
    origin = read_settings(ctx, home, config)
    from innkeeper.launch import end_guests as end

    end(origin.settings)


def read_settings(
    ctx: typer.Context, home: Path | None, config: Path | None = None, **overrides: object
) -> SettingsOrigin:
    """The settings of the file, the environment and the options; ends the command with one line for each that is wrong."""
    from innkeeper.settings_sources import SettingsError, settings_with_origin

    target: Target = ctx.obj
    said = ctx.find_root().get_parameter_source("home")
    before = target.home if said is not None and said.name == "COMMANDLINE" else None
    try:
        return settings_with_origin(find_settings_file(config), home=home or before, **overrides)
    except SettingsError as error:
        for problem in error.problems:
            note(f"inn: {problem}")
        raise SystemExit(USAGE) from None
    except ValueError as error:
        fail(error, status=USAGE)
