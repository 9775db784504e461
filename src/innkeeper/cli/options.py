"""Options that many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Profile = Annotated[str, typer.Argument(metavar="PROFILE", help="Name or id of a profile.")]
Room = Annotated[str, typer.Argument(metavar="ROOM", help="Id of a room: any text of 1 to 255 characters.")]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Settings file (TOML), in place of INNKEEPER_CONFIG.",
        show_default="/etc/innkeeper/innkeeper.toml where it exists",
    ),
]
