"""`inn ls` and `inn cat`: look into the files of a room or a VM."""

from __future__ import annotations

import codecs
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from innkeeper.cli.connection import connect, refused
from innkeeper.cli.guest_files import RoomPlace, VmPlace, entries, parse_place
from innkeeper.cli.options import Json
from innkeeper.cli.printing import USAGE, fail, print_json, print_table, visible_lines

CHUNK_BYTES = 1 << 20
Where = Annotated[str, typer.Argument(metavar="PLACE", help="PROFILE/ROOM:/path or VM:path.")]


def ls(ctx: typer.Context, place: Where, json: Json = False) -> None:
    """List a directory of a room or VM."""
    where = _place(place)
    server = connect(ctx)
    found = list(entries(server, where.files(server), where.path))
    names = [os.fsdecode(entry.name) for entry in found]
    if json:
        print_json(
            [
                {
                    "name": name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
                    "type": entry.type,
                    "size": entry.size,
                    "mode": f"{entry.mode:04o}",
                    "modified_at": entry.modified_at,
                }
                for name, entry in zip(names, found, strict=True)
            ]
        )
        return
    rows = [
        (entry.type, f"{entry.mode:04o}", entry.size, entry.modified_at, name)
        for name, entry in zip(names, found, strict=True)
    ]
    print_table(("TYPE", "MODE", "SIZE", "MODIFIED", "NAME"), rows, empty="an empty directory")


def cat(ctx: typer.Context, place: Where) -> None:
    """Print a file of a room or VM. On a terminal, control characters in it are made visible; elsewhere its bytes are as they are."""
    where = _place(place)
    server = connect(ctx)
    url, query = where.files(server).content(where.path)
    with server.stream("GET", url, params=query) as response:
        if response.status_code != 200:
            refused(response)
        shown = codecs.getincrementaldecoder("utf-8")("replace") if sys.stdout.isatty() else None
        for chunk in response.iter_bytes(CHUNK_BYTES):
            if shown is not None:
                sys.stdout.write(visible_lines(shown.decode(chunk)))
            else:
                sys.stdout.buffer.write(chunk)
        sys.stdout.flush()


def _place(text: str) -> RoomPlace | VmPlace:
    place = parse_place(text)
    if isinstance(place, Path):
        fail("the place must be PROFILE/ROOM:/path or VM:path", status=USAGE)
    return place
