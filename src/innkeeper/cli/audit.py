"""`inn audit`: who did what."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import print_json, print_table

PAGE = 1_000


def audit(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many events, newest first.")] = 50,
    json: Json = False,
) -> None:
    """List audit events: who did what to which object."""
    server = connect(ctx)
    events: list[dict[str, Any]] = []
    cursor: str | None = None
    while len(events) < limit:
        page = server.get("/v1/audit", limit=min(PAGE, limit - len(events)), cursor=cursor)
        events += page["events"]
        cursor = page["next_cursor"]
        if cursor is None or not page["events"]:
            break
    if json:
        print_json(events[:limit])
        return
    rows = [
        (
            event["at"],
            event["actor"],
            event["action"],
            event["object_type"],
            event["object_id"],
            " ".join(f"{name}={value}" for name, value in event["details"].items()) or None,
        )
        for event in events[:limit]
    ]
    print_table(("AT", "ACTOR", "ACTION", "OBJECT", "ID", "DETAILS"), rows, empty="no events")
