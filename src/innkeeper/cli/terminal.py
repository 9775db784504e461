"""`inn terminal`: one's own terminal, joined to one in a guest. It is given back as it was on every way out."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from innkeeper.cli.connection import connect, encode_segment
from innkeeper.cli.printing import USAGE, fail, note

if TYPE_CHECKING:
    from innkeeper.cli.connection import Server

DETACHED = 0


def terminal(
    ctx: typer.Context,
    vm: Annotated[str | None, typer.Argument(metavar="[VM]", help="Id of a VM.", show_default=False)] = None,
    room: Annotated[
        str | None, typer.Option(metavar="PROFILE/ROOM", help="A room instead; it is made when it is missing.")
    ] = None,
    attach: Annotated[str | None, typer.Option(metavar="ID", help="Go back to a terminal that was left.")] = None,
    shell: Annotated[str | None, typer.Option(metavar="PROGRAM", help="A program in place of the login shell.")] = None,
    line: Annotated[str | None, typer.Option("--command", "-c", metavar="LINE", help="A shell line.")] = None,
    detach_key: Annotated[
        str, typer.Option(metavar="KEY", help="Leave the terminal running and come back to your own; '' for none.")
    ] = "ctrl-]",
    list_: Annotated[bool, typer.Option("--list", help="List the terminals that run, and open none.")] = False,
) -> None:
    """Open a terminal in a VM or a room. The exit status is its program's; a terminal that is left runs on.

    A connection that breaks is tried again for a minute, and the output goes on where it was.
    """
    # asyncio takes longer to come than every other command's answer.
    import asyncio

    from innkeeper.cli.terminal_relay import join, window

    if (vm is None) == (room is None):
        fail("give either a VM or --room PROFILE/ROOM", status=USAGE)
    key = _key(detach_key)
    server = connect(ctx)
    base = _room_base(server, room) if room is not None else f"/v1/vms/{encode_segment(vm or '')}"
    if list_:
        _list(server, base)
        return
    if attach is None:
        cols, rows = window()
        body = {"cols": cols, "rows": rows, "shell": shell, "command": line}
        made = server.call("POST", f"{base}/pty/sessions", {k: v for k, v in body.items() if v is not None})
        name = str(made["id"])
    else:
        name = attach
        server.get(f"{base}/pty/sessions/{encode_segment(name)}")
    where = ["--room", room] if room is not None else [str(vm)]
    come_back = shlex.join(["inn", "terminal", *where, "--attach", name])
    ended = asyncio.run(join(server, f"{base}/pty/{encode_segment(name)}/connect", key, come_back=come_back))
    if ended is None:
        note(f"inn: left the terminal running; come back with: {come_back}")
        raise SystemExit(DETACHED)
    raise SystemExit(ended & 0xFF)


def _room_base(server: Server, room: str) -> str:
    profile, slash, room_id = room.partition("/")
    if not (slash and profile and room_id):
        fail("--room: give PROFILE/ROOM", status=USAGE)
    made = server.call("POST", server.room_path(profile, room_id))
    return f"/v1/rooms/{made['instance_id']}"


def _list(server: Server, base: str) -> None:
    from innkeeper.cli.printing import print_table

    rows = [
        (row["id"], f"{row['cols']}x{row['rows']}", row["viewers"], row["created_at"], row["command"] or "login shell")
        for row in server.get(f"{base}/pty/sessions")
    ]
    print_table(("ID", "SIZE", "VIEWERS", "CREATED", "COMMAND"), rows, empty="no terminals")


def _key(name: str) -> bytes:
    """The byte of a key named `ctrl-x`; none for an empty name."""
    if not name:
        return b""
    letter = name.lower().removeprefix("ctrl-").upper()
    if not name.lower().startswith("ctrl-") or len(letter) != 1 or not "@" <= letter <= "_":
        fail(f"--detach-key: '{name}' is not ctrl- and a letter or one of @ [ \\ ] ^ _", status=USAGE)
    return bytes([ord(letter) & 0x1F])
