"""What the daemon measures of itself, for `/metrics`: counters and histograms of what happens in it.

No label has values without end: no instance, image or profile is ever one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from innkeeper.core.instance import BootStep

PHASES = ("thaw", "baseline", "turn", "guest", "changes")
CLAIMED, COLD, RESTARTED = STARTS = ("claimed", "cold", "restarted")
_QUICK = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 600, 3600)
_STARTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)


class CommandClock:
    """Measures one command, phase by phase; what was not reached is not measured."""

    def __init__(self, phases: Mapping[str, Histogram], whole: Histogram, outcomes: Counter) -> None:
        self._phases, self._whole, self._outcomes = phases, whole, outcomes
        self._laps: list[tuple[str, float]] = []
        self._began = self._at = time.monotonic()

    def lap(self, phase: str) -> None:
        """One of PHASES has ended."""
        now = time.monotonic()
        self._laps.append((phase, now - self._at))
        self._at = now

    def end(self, *, timed_out: bool) -> None:
        """The command has a result. Only now the laps count: nobody waits any more."""
        for phase, seconds in self._laps:
            self._phases[phase].observe(seconds)
        self._whole.observe(self._at - self._began)
        self._outcomes.labels("timed_out" if timed_out else "done").inc()


class HostMetrics:
    """The daemon's instruments. Observing and counting cost a few microseconds each."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        step = self._histogram(
            "start_step_seconds", "Time in one step of making a guest ready.", ("start", "step"), _STARTS
        )
        self._step = step
        start = self._histogram(
            "start_seconds", "Time from the request for a ready guest to its readiness.", ("start",), _STARTS
        )
        self._start = {name: start.labels(name) for name in STARTS}
        phase = self._histogram("execution_phase_seconds", "Time in one phase of a command.", ("phase",), _QUICK)
        self._phase = {name: phase.labels(name) for name in PHASES}
        self._execution = self._histogram(
            "execution_seconds", "Time from a command's arrival to its result.", (), _QUICK
        )
        self._executions = self._counter("executions", "Commands that ended.", ("outcome",))
        self._cells = self._counter(
            "cells", "Cells that ended, by what became of their interpreter: kept, fresh or lost.", ("outcome",)
        )
        self._failed_starts = self._counter("start_failures", "Guests that could not be made ready.", ("code",))
        self._claims = self._counter(
            "warm_claims",
            "New rooms and VMs with a warm pool: they took a guest of it, or found none.",
            ("kind", "outcome"),
        )
        # So that what did not happen yet is there, as 0.
        for kind, outcome in itertools.product(("room", "vm"), ("claimed", "missed")):
            self._claims.labels(kind, outcome)
        for outcome in ("kept", "fresh", "lost"):
            self._cells.labels(outcome)
        self._warm_failures = self._counter("warm_build_failures", "Warm guests that could not be made.", ())
        self._scan = self._histogram("scan_seconds", "Time of one scan for file changes.", ("kind",), _QUICK)
        self._scan_failures = self._counter("scan_failures", "Scans that failed.", ("code",))
        self._links = self._counter(
            "guest_links", "Links of guest agents: the first of a guest, or one after it broke.", ("kind",)
        )
        self._machine_failures = self._counter("machine_failures", "Guests that ended or broke by themselves.", ())
        self._builds = self._counter("image_builds", "Builds of shipped images that ended.", ("outcome",))

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"innkeeper_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(f"innkeeper_{name}", text, labels, buckets=buckets, registry=self.registry)

    def observe_start(self, trace: Sequence[BootStep], start: str) -> None:
        """A guest became ready; `start` is one of STARTS."""
        for before, after in itertools.pairwise(trace):
            self._step.labels(start, after.step).observe((after.at_ms - before.at_ms) / 1000)
        if trace:
            self._start[start].observe(trace[-1].at_ms / 1000)

    def count_failed_start(self, code: str) -> None:
        """A guest could not be made ready."""
        self._failed_starts.labels(code).inc()

    def count_claim(self, kind: str, *, found: bool) -> None:
        """A new instance took a warm guest of a pool of this kind, or there was none."""
        self._claims.labels(kind, "claimed" if found else "missed").inc()

    def count_cell(self, outcome: str) -> None:
        """A cell has ended; its interpreter was `kept`, began with it (`fresh`), or ended with it (`lost`)."""
        self._cells.labels(outcome).inc()

    def count_failed_warm_build(self) -> None:
        """A guest for a pool could not be made."""
        self._warm_failures.inc()

    def command_clock(self) -> CommandClock:
        """The clock of a command that begins now."""
        return CommandClock(self._phase, self._execution, self._executions)

    def count_lost_command(self) -> None:
        """A command has no result."""
        self._executions.labels("lost").inc()

    def observe_scan(self, kind: str, seconds: float) -> None:
        """A scan was made: `baseline` or `changes`."""
        self._scan.labels(kind).observe(seconds)

    def count_failed_scan(self, code: str) -> None:
        """A scan failed; `code` is the scanner's."""
        self._scan_failures.labels(code).inc()

    def count_link(self, *, again: bool) -> None:
        """An agent's link came up."""
        self._links.labels("again" if again else "first").inc()

    def count_machine_failure(self) -> None:
        """A guest failed."""
        self._machine_failures.inc()

    def count_image_build(self, outcome: str) -> None:
        """A shipped image was built: `done` or `failed`."""
        self._builds.labels(outcome).inc()

    def families(self) -> list[dict[str, Any]]:
        """Every instrument as `core.metric.families` spells readings."""
        return [
            {
                "name": family.name,
                "type": family.type,
                "help": family.documentation,
                # When a counter was made is of no use after a restart of either process.
                "samples": [
                    [one.name, one.labels, one.value] for one in family.samples if not one.name.endswith("_created")
                ],
            }
            for family in self.registry.collect()
        ]
