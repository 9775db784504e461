"""Options that many commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Profile = Annotated[str, typer.Argument(metavar="PROFILE", help="Name or id of a profile.")]
Room = Annotated[str, typer.Argument(metavar="ROOM", help="Id of a room: any text of 1 to 255 characters.")]
