"""`inn room`: the rooms of the organization."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from innkeeper.cli.connection import Server, connect
from innkeeper.cli.options import Json, Profile, Room
from innkeeper.cli.printing import fail, print_fields, print_json, print_table, say

app = typer.Typer(help="Rooms: isolated guest computers.", no_args_is_help=True)


@app.command()
def create(
    ctx: typer.Context,
    profile: Profile,
    room: Room,
    host: Annotated[str | None, typer.Option(metavar="ID", help="Id of the host it must be on.")] = None,
    json: Json = False,
) -> None:
    """Get a room, making it when it is missing, and wait until it is ready."""
    server = connect(ctx)
    body = {"host_id": host} if host is not None else None
    answer = server.call("POST", server.room_path(profile, room), body)
    if json:
        print_json(answer)
        return
    print_fields(
        (
            ("room", answer["room_id"]),
            ("profile", answer["profile"]["name"]),
            ("status", answer["status"]),
            ("instance", answer["instance_id"]),
            ("host", answer["host"]["name"] if answer.get("host") else None),
        )
    )


@app.command("list")
def list_(
    ctx: typer.Context,
    profile: Annotated[str | None, typer.Option(help="Only those of this profile, by name or id.")] = None,
    json: Json = False,
) -> None:
    """List the rooms."""
    server = connect(ctx)
    wanted = server.profile_id(profile) if profile is not None else None
    rooms = [room for room in server.get("/v1/rooms") if wanted in (None, room["profile_id"])]
    if json:
        print_json(rooms)
        return
    rows = [
        (
            room["profile_name"],
            room["room_id"],
            room["status"],
            room["isolation"]["level"] if room["isolation"] else None,
            room["host"]["name"] if room["host"] else None,
            room["created_at"],
            room["last_active_at"],
            room["instance_id"],
        )
        for room in rooms
    ]
    columns = ("PROFILE", "ROOM", "STATUS", "ISOLATION", "HOST", "CREATED", "LAST ACTIVE", "INSTANCE")
    print_table(columns, rows, empty="no rooms")


@app.command()
def show(ctx: typer.Context, profile: Profile, room: Room, json: Json = False) -> None:
    """Show a room: its state, what isolates it, and where its start time went."""
    server = connect(ctx)
    detail = server.get(f"/v1/rooms/{_find(server, profile, room)['instance_id']}")
    if json:
        print_json(detail)
        return
    isolation: dict[str, Any] = detail["isolation"] or {}
    print_fields(
        (
            ("room", detail["room_id"]),
            ("profile", detail["profile_name"]),
            ("status", detail["status"]),
            ("failure", detail["failure"]),
            ("instance", detail["instance_id"]),
            ("host", detail["host"]["name"] if detail["host"] else None),
            ("isolation", isolation.get("level")),
            ("driver", f"{isolation['driver']} ({isolation['platform']})" if isolation else None),
            ("because", isolation.get("reason")),
            ("created", detail["created_at"]),
            ("last active", detail["last_active_at"]),
        )
    )
    if detail["boot_trace"]:
        print()
        sys.stdout.flush()
        before = 0.0
        rows = []
        for step in detail["boot_trace"]:
            rows.append((step["step"], f"{step['at_ms']:.1f}", f"{step['at_ms'] - before:.1f}"))
            before = step["at_ms"]
        print_table(("STEP", "AT MS", "TOOK MS"), rows)


@app.command()
def rm(ctx: typer.Context, profile: Profile, room: Room, json: Json = False) -> None:
    """Destroy a room with everything in it."""
    server = connect(ctx)
    server.call("DELETE", server.room_path(profile, room))
    if json:
        print_json({"room_id": room, "destroyed": True})
    else:
        say(f"destroyed room {room}")


def _find(server: Server, profile: str, room: str) -> dict[str, Any]:
    wanted = server.profile_id(profile)
    for one in server.get("/v1/rooms"):
        if one["profile_id"] == wanted and one["room_id"] == room:
            found: dict[str, Any] = one
            return found
    fail(f"there is no room '{room}' of profile '{profile}': see inn room list")
