"""`inn capacity`: what a host has room for, and what bounds it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import print_fields, print_json, print_table


def capacity(
    ctx: typer.Context,
    host: Annotated[
        str | None,
        typer.Argument(metavar="[HOST]", help="Name or id; not needed where there is one.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Show memory, disk, network places and instances of a host, and how many more rooms of each profile it would take."""
    server = connect(ctx)
    report: dict[str, Any] = server.get(f"/v1/hosts/{server.host(host)['id']}/capacity")
    if json:
        print_json(report)
        return
    states = ", ".join(f"{count} {state}" for state, count in report["instances"].items())
    limit = (
        f"({report['memory_mb']} - {report['memory_reserve_mb']} in reserve) x {report['memory_overcommit']:g}"
        f" = {report['memory_limit_mb']} MiB may be promised"
    )
    print_fields(
        (
            ("host", report["name"] + (" (draining)" if report["draining"] else "")),
            ("memory", limit),
            ("promised", f"{report['memory_committed_mb']} MiB, of which warm guests hold {report['memory_warm_mb']}"),
            ("disk", f"{report['disk_free_mb']} MiB free, {report['disk_reserve_mb']} in reserve"),
            ("network", f"{report['slots_used']} of {report['slots']} places"),
            ("waiting", f"{report['starts_waiting']} cold starts, {report['executions_waiting']} commands"),
            ("instances", states or "none"),
        )
    )
    print()
    rows = [
        (one["profile_name"], one["organization"], one["memory_mb"], one["more"], one["bound_by"])
        for one in report["profiles"]
    ]
    print_table(("PROFILE", "ORGANIZATION", "MEMORY MB", "MORE ROOMS", "BOUND BY"), rows, empty="no profiles")
