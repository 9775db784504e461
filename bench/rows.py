"""Rows of the table: samples, what they are held against, and the verdict."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Budget:
    """A ceiling for the median and the 95th percentile, or (`at_least`) a floor; `ratios` are bounds of
    median / a peer's median."""

    median: float | None = None
    p95: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    at_least: bool = False

    def describe(self) -> str:
        """As the table shows it."""
        sign = "≥" if self.at_least else "≤"
        parts = []
        if self.median is not None:
            parts.append(f"{sign} {self.median:g}" + (f" ({self.p95:g})" if self.p95 is not None else ""))
        elif self.p95 is not None:
            parts.append(f"{sign} ({self.p95:g})")
        parts += [f"{sign} {limit:g} x {peer}" for peer, limit in self.ratios.items()]
        return "; ".join(parts)


@dataclass
class Row:
    """One line: its samples, the failures among the tries, and its peers' samples taken in between."""

    name: str
    title: str
    unit: str = "ms"
    budget: Budget | None = None
    values: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    peers: dict[str, Row] = field(default_factory=dict)
    note: str = ""
    # Of the machine, over the minute in which it was measured: what else ran beside.
    load: float | None = None

    def peer(self, name: str) -> Row:
        """The row of a peer, made at its first use."""
        return self.peers.setdefault(name, Row(name, name, self.unit))

    def take(self, work: Callable[[], Any]) -> float | None:
        """Time one call in milliseconds. A call that raises is a failed try, and has no time."""
        began = time.perf_counter()
        try:
            work()
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return None
        took = (time.perf_counter() - began) * 1000
        self.values.append(took)
        return took

    @property
    def median(self) -> float | None:
        """The median; None without samples."""
        return statistics.median(self.values) if self.values else None

    @property
    def p95(self) -> float | None:
        """The 95th percentile (nearest rank; the 5th where more is better); None with fewer than five samples."""
        if len(self.values) < 5:
            return None
        ordered = sorted(self.values, reverse=self.budget is not None and self.budget.at_least)
        return ordered[max(0, math.ceil(0.95 * len(ordered)) - 1)]

    @property
    def best(self) -> float | None:
        """The best sample: what it costs when nothing else wants the processor just then."""
        if not self.values:
            return None
        return max(self.values) if self.budget is not None and self.budget.at_least else min(self.values)

    @property
    def tries(self) -> int:
        """How often it was tried."""
        return len(self.values) + len(self.failures)

    def ratio(self, peer: str) -> float | None:
        """Median over the peer's median."""
        other = self.peers[peer].median if peer in self.peers else None
        return None if self.median is None or not other else self.median / other

    def misses(self) -> list[str]:
        """What of the budget was not met."""
        budget = self.budget
        if budget is None:
            return []
        found = []
        for what, value, limit in (("median", self.median, budget.median), ("p95", self.p95, budget.p95)):
            if limit is None or (what == "p95" and value is None):
                continue
            if value is None or (value < limit if budget.at_least else value > limit):
                found.append(what)
        for peer, limit in budget.ratios.items():
            ratio = self.ratio(peer)
            if ratio is not None and (ratio < limit if budget.at_least else ratio > limit):
                found.append(f"x {peer}")
        return found + (["failures"] if self.failures else [])

    def as_json(self) -> dict[str, Any]:
        """Everything, samples included."""
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "best": self.best,
            "median": self.median,
            "p95": self.p95,
            "n": len(self.values),
            "tries": self.tries,
            "budget": None if self.budget is None else self.budget.describe(),
            "misses": self.misses(),
            "ratios": {peer: self.ratio(peer) for peer in self.peers},
            "values": [round(value, 4) for value in self.values],
            "failures": self.failures,
            "note": self.note,
            "load": self.load,
            "peers": [peer.as_json() for peer in self.peers.values()],
        }
