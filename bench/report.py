"""The table on the terminal, and the same as JSON."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.rows import Row


def machine() -> dict[str, Any]:
    """Where and when this was measured."""
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    }
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "cpu": ", ".join(sorted(models)),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_048_576,
        "kernel": platform.release(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def number(value: float | None) -> str:
    """Three significant digits, no exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def success(row: Row) -> str:
    """The share of tries that worked."""
    return "-" if not row.tries else f"{len(row.values)}/{row.tries}"


def against(row: Row) -> str:
    """Ratio to each peer and the peer's own median."""
    lines = []
    for name, peer in row.peers.items():
        ratio = row.ratio(name)
        failed = f", {success(peer)}" if peer.failures else ""
        lines.append(f"{number(ratio) if ratio is not None else '-'} x {name} ({number(peer.median)}{failed})")
    return "\n".join(lines)


def verdict(row: Row) -> str:
    """pass, or what missed."""
    if row.budget is None:
        return "" if not row.failures else "failures"
    misses = row.misses()
    return "pass" if not misses else "MISS " + ", ".join(misses)


def print_table(rows: Iterable[Row], *, title: str) -> None:
    """Print the rows."""
    table = Table(title=title, show_lines=True)
    for column in ("row", "best", "median", "p95", "n", "unit", "budget", "against", "load", ""):
        table.add_column(column, justify="right" if column in ("best", "median", "p95", "n", "load") else "left")
    for row in rows:
        result = verdict(row)
        colour = "green" if result == "pass" else "red" if result else ""
        table.add_row(
            row.title + (f"\n[dim]{row.note}[/dim]" if row.note else ""),
            number(row.best),
            number(row.median),
            number(row.p95),
            success(row),
            row.unit,
            "" if row.budget is None else row.budget.describe(),
            against(row),
            number(row.load),
            f"[{colour}]{result}[/{colour}]" if colour else "",
        )
    Console(width=None if os.isatty(1) else 170).print(table)


def as_json(rows: Iterable[Row], *, before: dict[str, Any], platform_reason: str) -> dict[str, Any]:
    """The whole run."""
    return {
        "machine": before,
        "load_after": [round(value, 2) for value in os.getloadavg()],
        "platform": platform_reason,
        "rows": [row.as_json() for row in rows],
    }


def markdown(rows: Iterable[Row]) -> str:
    """The table as Markdown, for docs/performance.md."""
    lines = [
        "| row | best | median | p95 | ok | unit | budget | against | load | |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- | --- | ---: | --- |",
    ]
    for row in rows:
        peers = against(row).replace("\n", "; ")
        cells = (row.title, number(row.best), number(row.median), number(row.p95), success(row), row.unit)
        budget = "" if row.budget is None else row.budget.describe()
        lines.append(f"| {' | '.join(cells)} | {budget} | {peers} | {number(row.load)} | {verdict(row)} |")
    return "\n".join(lines)
