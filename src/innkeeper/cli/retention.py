"""`inn retention`: what of an organization's snapshots and checkpoints goes by itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import human_size, print_json, print_table, say

app = typer.Typer(help="Retention: which snapshots and checkpoints of volumes go by themselves.", no_args_is_help=True)

KINDS = ("snapshots", "volume_checkpoints")
LIMITS = ("keep_last", "max_age_days", "max_bytes")


@app.command()
def show(ctx: typer.Context, json: Json = False) -> None:
    """Show what goes by itself."""
    _print(connect(ctx).get("/v1/retention"), json=json)


@app.command("set")
def set_(
    ctx: typer.Context,
    kind: Annotated[
        Literal["snapshots", "volume-checkpoints"],
        typer.Argument(metavar="KIND", help="snapshots or volume-checkpoints"),
    ],
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Of each VM or volume the newest N stay.", show_default=False)
    ] = None,
    max_age_days: Annotated[int | None, typer.Option(min=1, help="Older ones go.", show_default=False)] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="The oldest go where all take more; the newest of each stays.", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Without this it is only listed what would go.")] = False,
    json: Json = False,
) -> None:
    """Set a kind's limits; one that is not named is none. Lists what would go; in force with --yes."""
    server = connect(ctx)
    policy: dict[str, Any] = server.get("/v1/retention")
    policy[kind.replace("-", "_")] = dict(zip(LIMITS, (keep_last, max_age_days, max_bytes), strict=True))
    if yes:
        _print(server.call("PUT", "/v1/retention", policy), json=json)
    else:
        _print_excess(
            server.call("POST", "/v1/retention/apply", {"policy": policy}), "would go; set it with --yes", json=json
        )


@app.command()
def apply(
    ctx: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only listed.")] = False,
    json: Json = False,
) -> None:
    """List what goes by the policy; remove it at once with --yes."""
    found = connect(ctx).call("POST", "/v1/retention/apply", {"remove": yes})
    _print_excess(found, "removed" if yes else "to be removed with --yes", json=json)


def _print(policy: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(policy)
        return
    rows = [(kind, *(policy[kind][limit] for limit in LIMITS)) for kind in KINDS]
    print_table(("KIND", "KEEP LAST", "MAX AGE DAYS", "MAX BYTES"), rows, empty="")


def _print_excess(found: dict[str, Any], said: str, *, json: bool) -> None:
    if json:
        print_json(found)
        return
    rows = [
        (
            one["kind"],
            one["id"],
            one["name"],
            one["created_at"],
            human_size(one["size_bytes"]),
            one["reason"],
            one["stays"],
        )
        for one in found["items"]
    ]
    print_table(("KIND", "ID", "NAME", "CREATED", "SIZE", "BY", "STAYS"), rows, empty="nothing")
    say(f"{said}: {human_size(found['total_bytes'])}")
