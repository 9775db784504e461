"""What instances have used of the host: processor time of their machines, and how long they held their memory.

What runs is read from its control group, whose counters outlive the daemon. What has ended is a file until the control side has counted it, so a daemon that is
killed in between loses nothing; what ends with the whole host is lost, from the last count on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from innkeeper.host.linux.cgroup import Usage
from innkeeper.host.machine import MachineRecord, write_json

log = structlog.stdlib.get_logger(__name__)

# Told in one answer; what is left comes with the next.
ENDED_AT_ONCE = 1_000


@dataclass(frozen=True, slots=True)
class MachineUsage:
    """The sums of one machine since its instance has it. The start of its guest is in `cpu_us`."""

    machine_id: str
    instance_id: str
    cpu_us: int
    memory_mb: int
    seconds: float


class UsageLedger:
    """Owns the files of machines that have ended and are not yet counted."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def sweep(self) -> None:
        """Remove what a daemon that was killed had half written."""
        for path in self._directory.glob("*.new"):
            path.unlink(missing_ok=True)

    def note_end(self, record: MachineRecord, used: Usage) -> None:
        """Keep what a machine has used, just before its control group goes. One of no instance is nobody's; the second call changes nothing."""
        whole = usage_of(record, used)
        if whole is None or record.ended:
            return
        record.ended = True
        try:
            write_json(self._directory / f"{record.machine_id}.json", asdict(whole))
        except OSError as error:
            # A full disk must not keep a guest from being taken away.
            log.warning("what a machine used is not kept", machine=record.machine_id, error=str(error))

    def ended(self) -> list[MachineUsage]:
        """Those that have ended, at most ENDED_AT_ONCE."""
        found = []
        for path in sorted(self._directory.glob("*.json"))[:ENDED_AT_ONCE]:
            try:
                found.append(MachineUsage(**json.loads(path.read_text())))
            except (OSError, ValueError, TypeError):
                log.warning("a record of what a machine used cannot be read", machine=path.stem)
                path.unlink(missing_ok=True)
        return found

    def forget(self, machine_ids: Iterable[str]) -> None:
        """They are counted."""
        known = {path.stem for path in self._directory.glob("*.json")}
        for machine_id in known.intersection(machine_ids):
            (self._directory / f"{machine_id}.json").unlink(missing_ok=True)


def usage_of(record: MachineRecord, used: Usage) -> MachineUsage | None:
    """What a machine has used until now; None for one that no instance has."""
    if record.instance_id is None or record.claimed_at is None:
        return None
    return MachineUsage(
        machine_id=record.machine_id,
        instance_id=str(record.instance_id),
        cpu_us=used.cpu_us,
        memory_mb=record.shape.memory_mb,
        seconds=max(0.0, time.time() - record.claimed_at),
    )
