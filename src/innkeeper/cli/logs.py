"""`inn logs`: the log of a VM or a room, and what comes."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from typing import Annotated, Any

import typer

from innkeeper.cli.connection import Server, connect, encode_segment, refused
from innkeeper.cli.options import Json
from innkeeper.cli.printing import fail, note, print_json, visible
from innkeeper.cli.program import INTERRUPTED, SILENCE_SECONDS, numbered_events

# How long a server that went away is waited for, and how often it is asked.
AWAY_SECONDS = 120.0
PAUSE_SECONDS = 0.5


def logs(
    ctx: typer.Context,
    of: Annotated[str, typer.Argument(metavar="VM|PROFILE/ROOM", help="Whose log.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with the lines that come.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=1_000, help="How many of the newest lines.")] = 200,
    json: Json = False,
) -> None:
    """Show the log of a VM or a room: its life, what the platform decided, and what its main process says."""
    server = connect(ctx)
    path = _path(server, of)
    if not follow:
        page = server.get(path, lines=lines)
        if json:
            print_json(page)
            return
        for line in page["lines"]:
            _show(line)
        return
    try:
        _follow(server, f"{path}/stream", lines, json=json)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _path(server: Server, of: str) -> str:
    profile, slash, room = of.partition("/")
    if not slash:
        return f"/v1/vms/{encode_segment(of)}/logs"
    wanted = server.profile_id(profile)
    for one in server.get("/v1/rooms"):
        if (one["profile_id"], one["room_id"]) == (wanted, room):
            return f"/v1/rooms/{one['instance_id']}/logs"
    fail(f"there is no room '{of}': see inn room list")


def _follow(server: Server, path: str, lines: int, *, json: bool) -> None:
    """Print lines until the instance has ended; a connection that breaks is made again where it was."""
    import httpx2

    cursor: str | None = None
    away_since: float | None = None
    while True:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": cursor} if cursor is not None else {})}
        timeout = httpx2.Timeout(SILENCE_SECONDS, connect=5.0)
        try:
            with server.raw_stream("GET", path, params={"lines": lines}, headers=headers, timeout=timeout) as response:
                if response.status_code < 500 and response.is_error:
                    refused(response)
                response.raise_for_status()
                for number, event, data in numbered_events(response):
                    away_since = None
                    cursor = number or cursor
                    if event == "end":
                        return
                    if event == "error":
                        break
                    _print(event, data, json=json)
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
        else:
            reason = "the server ended the stream"
        now = time.monotonic()
        away_since = away_since or now
        if now - away_since > AWAY_SECONDS:
            fail(f"the log cannot be followed any more: {reason}")
        time.sleep(PAUSE_SECONDS)


def _print(event: str, data: dict[str, Any], *, json: bool) -> None:
    if event == "log" and json:
        print(jsonlib.dumps(data, ensure_ascii=True).replace("\x7f", "\\u007f"), flush=True)
    elif event == "log":
        _show(data)
        sys.stdout.flush()
    elif event == "gap":
        note(f"inn: {data['last'] - data['first'] + 1} lines are not kept any more")


def _show(line: dict[str, Any]) -> None:
    print(f"{line['at']} {line['level']:<7} {line['source']:<9} {visible(line['message'])}")
