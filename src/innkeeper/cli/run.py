"""`inn run`: a command in a room. Output as it comes, the command's exit status, then the files it changed."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from innkeeper.cli.connection import connect, refused
from innkeeper.cli.options import Json, Profile, Room
from innkeeper.cli.printing import USAGE, fail, human_size, note, print_json
from innkeeper.cli.profile import parse_env
from innkeeper.cli.program import (
    INTERRUPTED,
    SILENCE_SECONDS,
    Cwd,
    Env,
    Outputs,
    Raw,
    Stdin,
    events,
    read_stdin,
    stdin_is_input,
)

if TYPE_CHECKING:
    from innkeeper.cli.connection import Server


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
    cwd: Cwd = None,
    env: Env = None,
    stdin: Stdin = None,
    changes: Annotated[
        bool, typer.Option("--changes/--no-changes", help="List the changed files on stderr afterwards.")
    ] = True,
    raw: Raw = False,
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


def _streamed(server: Server, path: str, body: dict[str, Any], *, raw: bool) -> dict[str, Any]:
    import httpx2

    outputs = Outputs(raw=raw)
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
                    outputs.write(data["data"])
                elif event == "error":
                    fail(data.get("message") or data.get("error"))
                elif event == "result":
                    outputs.end()
                    return data
    except KeyboardInterrupt:
        still = f"; it goes on in the room as execution {execution}" if execution else ""
        note(f"inn: stopped reading{still}")
        raise SystemExit(INTERRUPTED) from None
    fail(f"the server ended the stream without a result{f' (execution {execution})' if execution else ''}")


def _note_changes(result: dict[str, Any]) -> None:
    rows = result["files_changed"]
    for row in rows:
        size = "" if row["status"] == "deleted" else f"  ({human_size(row['size'])})"
        note(f"{row['status']:<8} {row['path']}{size}")
    more = result.get("files_changed_total", len(rows)) - len(rows)
    if more > 0:
        note(f"... and {more} more: see files_changed of execution {result['execution_id']} in the API")
