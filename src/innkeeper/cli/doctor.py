"""`inn doctor`: what this host can do, and the line to paste where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from innkeeper.cli.options import Config, Json
from innkeeper.cli.printing import print_json, visible
from innkeeper.cli.serve import read_settings

if TYPE_CHECKING:
    from innkeeper.host.probes.check import Check

STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def doctor(
    ctx: typer.Context,
    home: Annotated[Path | None, typer.Option(help="State directory.", show_default="/var/lib/innkeeper")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Take the long probes from the last full run.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Check what this host can do: one line per check, and a FIX line to paste for each failure.

    The exit status is 1 when the default driver cannot run here.
    """
    import asyncio
    import logging

    import structlog

    from innkeeper.host.inventory import take_inventory

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
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
