"""`inn drain`: taking a host out of service without breaking what it does."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import FAILED, note, print_fields, print_json

app = typer.Typer(
    help="Take a host out of service: nothing new, what runs is finished. For the operator alone.", no_args_is_help=True
)

POLL_SECONDS = 0.5

Host = Annotated[
    str | None, typer.Argument(metavar="[HOST]", help="Name or id; not needed where there is one.", show_default=False)
]


@app.command()
def on(
    ctx: typer.Context,
    host: Host = None,
    deadline_seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="From then on its rooms take nothing more either.", show_default="they go on as they like"
        ),
    ] = None,
    wait_seconds: Annotated[
        float,
        typer.Option(min=0, help="Wait until nothing is under way in its rooms; exit status 1 when that takes longer."),
    ] = 0,
    json: Json = False,
) -> None:
    """Have a host refuse new rooms with 503 and give up its warm pools. Its rooms can be used on."""
    server = connect(ctx)
    path = f"/v1/hosts/{server.host(host)['id']}/drain"
    until = time.monotonic() + wait_seconds
    row = server.call("POST", path, {"draining": True, "deadline_seconds": deadline_seconds})
    while row["open_calls"] and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
        row = server.host(row["id"])
    _show(row, json=json)
    if wait_seconds and row["open_calls"]:
        note(f"inn: {row['open_calls']} calls are still under way")
        raise SystemExit(FAILED)


@app.command()
def off(ctx: typer.Context, host: Host = None, json: Json = False) -> None:
    """Have a host take new rooms again."""
    server = connect(ctx)
    _show(server.call("POST", f"/v1/hosts/{server.host(host)['id']}/drain", {"draining": False}), json=json)


@app.command()
def status(ctx: typer.Context, host: Host = None, json: Json = False) -> None:
    """Show whether a host is being drained, and what is still under way."""
    _show(connect(ctx).host(host), json=json)


def _show(row: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(row)
        return
    print_fields(
        (
            ("host", row["name"]),
            ("draining", "yes" if row["draining"] else "no"),
            ("deadline", row["drain_deadline"]),
            ("rooms", row["rooms"]),
            ("open calls", row["open_calls"]),
        )
    )
