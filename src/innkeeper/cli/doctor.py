"""`inn doctor`: what this host can do, and the line to paste where it cannot."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Config, Json
from innkeeper.cli.printing import fail, note, print_json, visible
from innkeeper.cli.serve import read_settings

if TYPE_CHECKING:
    from innkeeper.host.probes.check import Check
    from innkeeper.settings import Settings

STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def doctor(
    ctx: typer.Context,
    home: Annotated[Path | None, typer.Option(help="State directory.", show_default="/var/lib/innkeeper")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Take the long probes from the last full run.")] = False,
    leaks: Annotated[
        bool,
        typer.Option("--leaks", help="List what a server has left on this host instead; status 1 when there is any."),
    ] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Check what this host can do: one line per check, and a FIX line to paste for each failure.

    The exit status is 1 when the default driver cannot run here.
    """
    import asyncio
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    if leaks:
        report_leaks(ctx, read_settings(ctx, home, config).settings, json=json)
        return
    from innkeeper.host.inventory import take_inventory

    inventory = asyncio.run(take_inventory(read_settings(ctx, home, config).settings, quick=quick))
    if json:
        print_json(inventory.as_dict())
    else:
        print_checks(inventory.checks)
        print(
            "The gVisor driver can run here."
            if inventory.ok
            else "The gVisor driver cannot run here: see the FIX lines."
        )
    if not inventory.ok:
        raise SystemExit(1)


def report_leaks(ctx: typer.Context, settings: Settings, *, json: bool) -> None:
    """One line for each thing that exists in the server's name and belongs to nothing, with its kind and its owner."""
    import asyncio
    from dataclasses import asdict, replace

    from innkeeper.host.leftovers import find_leftovers, server_runs

    if os.geteuid() != 0:
        fail("inn doctor --leaks needs root: it looks into the server's directories")
    found: list[dict[str, str]]
    if server_runs(settings):
        # Only the server knows what it is about to use.
        ctx.obj = replace(ctx.obj, home=settings.home, url=None)
        hosts = connect(ctx).get("/v1/hosts")
        unreachable = [host["name"] for host in hosts if not host["reachable"]]
        if unreachable:
            fail(f"these hosts do not answer: {', '.join(unreachable)}")
        found = [leak for host in hosts for leak in host["leaks"]]
    else:
        found = [asdict(leak) for leak in asyncio.run(find_leftovers(settings))]
    if json:
        print_json(found)
    else:
        for leak in found:
            print(f"{leak['kind']}  {visible(leak['owner'])}  {visible(leak['name'])}")
        note(f"{len(found)} leaked")
    if found:
        raise SystemExit(1)


def print_checks(checks: tuple[Check, ...]) -> None:
    """One line each, then its FIX line."""
    width = max(len(check.name) for check in checks)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        console = Console(soft_wrap=True)
        for check in checks:
            line = Text.assemble(
                (f"{check.word:<5}", STYLES[check.word]), f" {check.name:<{width}}  {visible(check.detail)}"
            )
            console.print(line)
            if check.fix and not check.ok:
                console.print(Text.assemble(("      FIX: ", "bold"), visible(check.fix)))
        return
    for check in checks:
        print(f"{check.word:<5} {check.name:<{width}}  {visible(check.detail)}")
        if check.fix and not check.ok:
            print(f"      FIX: {visible(check.fix)}")
