"""`inn run`: a command in a room. Output as it comes, the command's exit status, then the files it changed."""

from __future__ import annotations

import json as jsonlib
import os
import shlex
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from innkeeper.cli.connection import connect, refused
from innkeeper.cli.options import Json, Profile, Room
from innkeeper.cli.printing import USAGE, fail, human_size, note, print_json
from innkeeper.cli.profile import parse_env
from innkeeper.cli.terminal_filter import TerminalFilter

if TYPE_CHECKING:
    import httpx2

    from innkeeper.cli.connection import Server

INTERRUPTED = 130
# The stream carries a comment at least every 10 seconds.
SILENCE_SECONDS = 60.0


def run(
    ctx: typer.Context,
    profile: Profile,
    room: Room,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Command and arguments.", show_default=False)
    ] = None,
    line: Annotated[
        str | None, typer.Option("--command", "-c", metavar="LINE", help="A shell line instead of a command.")
    ] = None,
    timeout: Annotated[
        int | None, typer.Option(help="Seconds until it is killed, 1-3600; the profile's by default.")
    ] = None,
    cwd: Annotated[str | None, typer.Option(help="Working directory.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V", help="Environment variable, repeatable; 'K' alone takes the value from your own environment."
        ),
    ] = None,
    stdin: Annotated[
        bool | None,
        typer.Option("--stdin/--no-stdin", help="Pass standard input on.", show_default="when it is a pipe or a file"),
    ] = None,
    changes: Annotated[
        bool, typer.Option("--changes/--no-changes", help="List the changed files on stderr afterwards.")
    ] = True,
    raw: Annotated[
        bool, typer.Option("--raw", help="Let control sequences through to a terminal; colours always pass.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a command in a room; makes the room when it is missing. The exit status is the command's."""
    if bool(command) == (line is not None):
        fail("give either a command after -- or a shell line with -c", status=USAGE)
    body: dict[str, Any] = {"command": shlex.join(command) if command else line}
    if timeout is not None:
        body["timeout"] = timeout
    if cwd is not None:
        body["cwd"] = cwd
    if env:
        body["env"] = parse_env(env)
    if stdin if stdin is not None else stdin_is_input():
        body["stdin"] = read_stdin()
    server = connect(ctx)
    path = server.room_path(profile, room) + "/command"
    if json:
        answer = server.call("POST", path, body)
        print_json(answer)
    else:
        answer = _streamed(server, path, body, raw=raw)
        if changes:
            _note_changes(answer["result"])
    raise SystemExit(answer["result"]["exit_code"] & 0xFF)


def stdin_is_input() -> bool:
    """Whether somebody put something into standard input: it is a pipe, a file or a socket."""
    try:
        mode = stat.S_IFMT(os.fstat(sys.stdin.fileno()).st_mode)
    except (OSError, ValueError):
        return False  # closed
    return mode in (stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK)


def read_stdin() -> str:
    """All of standard input as text. Ends the command where it is none."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        fail("standard input is not UTF-8 text: copy it in with 'inn cp' and read it from there", status=USAGE)


def _streamed(server: Server, path: str, body: dict[str, Any], *, raw: bool) -> dict[str, Any]:
    import httpx2

    out = sys.stdout.buffer
    filtered = None if raw or not sys.stdout.isatty() else TerminalFilter()
    execution: str | None = None
    timeout = httpx2.Timeout(SILENCE_SECONDS, connect=5.0)
    try:
        with server.stream(
            "POST", path, json=body, headers={"Accept": "text/event-stream"}, timeout=timeout
        ) as response:
            if response.is_error:
                refused(response)
            for event, data in events(response):
                if event == "started":
                    execution = data["execution_id"]
                elif event == "output":
                    text = data["data"] if filtered is None else filtered.feed(data["data"])
                    out.write(text.encode("utf-8", "replace"))
                    out.flush()
                elif event == "error":
                    fail(data.get("message") or data.get("error"))
                elif event == "result":
                    if filtered is not None:
                        out.write(filtered.end().encode())
                        out.flush()
                    return data
    except KeyboardInterrupt:
        still = f"; it goes on in the room as execution {execution}" if execution else ""
        note(f"inn: stopped reading{still}")
        raise SystemExit(INTERRUPTED) from None
    fail(f"the server ended the stream without a result{f' (execution {execution})' if execution else ''}")


def events(response: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """(event, data) of a server-sent event stream."""
    for _, name, data in numbered_events(response):
        yield name, data


def numbered_events(response: httpx2.Response) -> Iterator[tuple[str | None, str, dict[str, Any]]]:
    """(id, event, data) of a server-sent event stream. Split at LF bytes only: the JSON may hold other line separators as they are."""
    rest = b""
    number: str | None = None
    name, data = "", b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line:
                if name:
                    yield number, name, jsonlib.loads(data)
                number, name, data = None, "", b""
            elif line.startswith(b"id: "):
                number = line[4:].decode("ascii", "replace")
            elif line.startswith(b"event: "):
                name = line[7:].decode("ascii", "replace")
            elif line.startswith(b"data: "):
                data = line[6:]


def _note_changes(result: dict[str, Any]) -> None:
    rows = result["files_changed"]
    for row in rows:
        size = "" if row["status"] == "deleted" else f"  ({human_size(row['size'])})"
        note(f"{row['status']:<8} {row['path']}{size}")
    more = result.get("files_changed_total", len(rows)) - len(rows)
    if more > 0:
        note(f"... and {more} more: see files_changed of execution {result['execution_id']} in the API")
