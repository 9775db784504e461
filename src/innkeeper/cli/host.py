"""`inn host`: the machines that run guests."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import fail, print_fields, print_json, print_table

app = typer.Typer(help="Hosts: the machines that run guests.", no_args_is_help=True)


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """List the hosts."""
    hosts: list[dict[str, Any]] = connect(ctx).get("/v1/hosts")
    if json:
        print_json(hosts)
        return
    rows = [
        (
            host["name"],
            _state(host),
            host.get("driver"),
            host.get("platform"),
            host.get("machines"),
            host.get("frozen"),
            _pair(host.get("memory_committed_mb"), host.get("memory_mb")),
            host.get("disk_free_mb"),
            host["id"],
        )
        for host in hosts
    ]
    columns = ("NAME", "STATE", "DRIVER", "PLATFORM", "GUESTS", "FROZEN", "MEMORY MB", "DISK FREE MB", "ID")
    print_table(columns, rows, empty="no hosts")


@app.command()
def status(
    ctx: typer.Context,
    host: Annotated[
        str | None, typer.Argument(metavar="[HOST]", help="Name or id; all hosts without it.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Show what hosts run, and how full and how tidy they are."""
    hosts = [one for one in connect(ctx).get("/v1/hosts") if host in (None, one["name"], one["id"])]
    if host is not None and not hosts:
        fail(f"there is no host '{host}': see inn host list")
    if json:
        print_json(hosts)
        return
    for position, one in enumerate(hosts):
        if position:
            print()
        pools = one.get("pools") or []
        print_fields(
            (
                ("name", one["name"]),
                ("id", one["id"]),
                ("state", _state(one)),
                ("drained by", one.get("drain_deadline")),
                ("rooms", one.get("rooms")),
                ("open calls", one.get("open_calls")),
                ("driver", one.get("driver")),
                ("platform", one.get("platform")),
                ("isolation", one.get("isolation_level")),
                ("because", one.get("reason")),
                ("drivers", "; ".join(_offer(offer) for offer in one.get("drivers") or []) or None),
                ("cpus", one.get("cpus")),
                ("memory", _pair(one.get("memory_committed_mb"), one.get("memory_mb"), " MiB given to guests")),
                ("disk free", f"{one['disk_free_mb']} MiB" if one.get("disk_free_mb") is not None else None),
                ("guests", _pair(one.get("frozen"), one.get("machines"), " frozen")),
                ("warm", f"{sum(pool['ready'] for pool in pools)} of {sum(pool['size'] for pool in pools)}"),
                ("leaked", one.get("leaked")),
                ("version", one.get("version")),
            )
        )


def _state(host: dict[str, Any]) -> str:
    if not host["reachable"]:
        return "unreachable"
    return "draining" if host["draining"] else "ready"


def _offer(offer: dict[str, Any]) -> str:
    isolation = offer["isolation"]
    if isolation is None:
        return f"{offer['driver']} cannot run: {offer['reason']}"
    return f"{offer['driver']} ({isolation['level']}, on {isolation['platform']})"


def _pair(part: int | None, whole: int | None, unit: str = "") -> str | None:
    return None if part is None or whole is None else f"{part} of {whole}{unit}"
