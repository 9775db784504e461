"""What an attack costs a neighbour: the median time of its commands, beside and without the attack, in the same run."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

FACTOR = 2.0
# A median of some twenty commands of about 10 ms on a machine that others use moves by some milliseconds of its own. An attack that starves the
# neighbour makes it wait for ten times that, so this much is forgiven, and of three attempts the best one counts: starvation shows in each.
NOISE_SECONDS = 0.010
ATTEMPTS = 3
LOAD_PER_CPU = 4
GROWTH_MIB = 50.0

Ask = Callable[[], Awaitable[object]]


async def median_seconds(ask: Ask, *, seconds: float) -> float:
    """The median duration of what `ask` does, again and again for that long, at a pace of 20 a second at most."""
    took = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(took) < 5:
        began = time.monotonic()
        await ask()
        took.append(time.monotonic() - began)
        await asyncio.sleep(max(0.0, 0.05 - took[-1]))
    return median(took)


@dataclass
class Side:
    """A neighbour's medians, one an attempt."""

    name: str
    quiet: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    # Before the attack. Where others want each processor several times over, the medians tell of them: they are printed, and not judged.
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    def fine(self) -> bool:
        """Whether the last attempt kept within the factor."""
        crowded = self.load > LOAD_PER_CPU * (os.cpu_count() or 1)
        return crowded or self.attacked[-1] <= FACTOR * self.quiet[-1] + NOISE_SECONDS

    def __str__(self) -> str:
        pairs = (f"{1000 * a:.1f}/{1000 * q:.1f} ms" for q, a in zip(self.quiet, self.attacked, strict=False))
        return f"{self.name}: neighbour's p50 attacked/quiet {', '.join(pairs)} (load {self.load:.0f})"


def proportional_mib(pid: int | str = "self") -> float:
    """Memory of a process, shared pages divided among their users (PSS), without those of files.

    The kernel drops pages of libraries that a process has not used for minutes and reads them again: that is tens of MiB of growth by nobody's attack.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kinds = ("Pss_Anon", "Pss_Shmem", "SwapPss")
    return sum(int(rollup.partition(f"\n{kind}:")[2].split()[0]) for kind in kinds) / 1024
