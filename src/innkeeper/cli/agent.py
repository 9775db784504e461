"""`inn agent`: the agents that come with the server."""

from __future__ import annotations

from typing import Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import print_json, print_table
from innkeeper.cli.shipped_image import build_agents

REASON_CHARACTERS = 120

app = typer.Typer(help="Agents that come with the server.", no_args_is_help=True)
app.command("build")(build_agents)


@app.callback()
def agent() -> None:
    """Agents that come with the server."""


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """List the agents, and why those that cannot be run cannot."""
    agents: list[dict[str, Any]] = connect(ctx).get("/v1/agents")
    if json:
        print_json(agents)
        return
    rows = [
        (
            one["id"],
            one["name"],
            "yes" if one["available"] else "no",
            one["cpus"],
            f"{one['memory_mb']} MiB",
            f"{one['volume_gb']} GiB",
            (one["reason"] or "").split("\n")[0][:REASON_CHARACTERS] or None,
        )
        for one in agents
    ]
    print_table(("AGENT", "NAME", "AVAILABLE", "CPUS", "MEMORY", "VOLUME", "REASON"), rows, empty="no agents")
