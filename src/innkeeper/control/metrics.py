"""Counters of the control side. Plain numbers: whoever renders them reads `snapshot`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(slots=True)
class Metrics:
    """What happened since the start of the process. `*_seconds` are sums; divided by their counter they give a mean."""

    rooms_created: int = 0
    rooms_claimed: int = 0
    rooms_restarted: int = 0
    rooms_destroyed: int = 0
    rooms_expired: int = 0
    rooms_refused: int = 0
    provisionings: int = 0
    provisioning_failures: int = 0
    provisioning_seconds: float = 0.0
    executions: int = 0
    execution_failures: int = 0
    execution_retries: int = 0
    file_reads: int = 0
    file_writes: int = 0
    public_file_reads: int = 0
    machines_adopted: int = 0
    machines_lost: int = 0
    machines_failed: int = 0
    orphans_destroyed: int = 0
    stale_writes: int = 0
    failed_writes: int = 0

    def snapshot(self) -> dict[str, float]:
        """Every counter by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
