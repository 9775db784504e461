"""`inn df`: whose takes how much of the disk."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import human_size, print_json, print_table, say


def df(
    ctx: typer.Context,
    host: Annotated[
        str | None,
        typer.Argument(metavar="[HOST]", help="Name or id; not needed where there is one.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Show what takes the disk space of the server's state directory, by organization and kind, the most first.

    OWN is what nothing else shares; together that is what the directory takes. SIZE has blocks in it that are shared with others.
    """
    server = connect(ctx)
    report: dict[str, Any] = server.get(f"/v1/hosts/{server.host(host)['id']}/disk")
    if json:
        print_json(report)
        return
    rows = [
        (
            one["organization"] or "-",
            one["kind"],
            one["count"],
            human_size(one["own_bytes"]),
            human_size(one["size_bytes"]),
        )
        for one in report["items"]
    ]
    print_table(("ORGANIZATION", "KIND", "COUNT", "OWN", "SIZE"), rows, empty="nothing")
    say(f"together: {human_size(report['total_bytes'])}")
