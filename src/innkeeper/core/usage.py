"""What guests use of a host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Used:
    """Processor time in microseconds, and MiB of memory times the seconds that they were held."""

    cpu_us: int = 0
    memory_mib_seconds: float = 0.0
