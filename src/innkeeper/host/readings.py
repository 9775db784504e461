"""What the daemon's metrics read of its queues, pools and resources when somebody asks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from innkeeper.core.metric import Reading, by_label, counter, gauge
from innkeeper.errors import InnkeeperError
from innkeeper.host.admission import Admission, Load, committed_mb, total_memory_mb
from innkeeper.host.change_scanner import ChangeScanner
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.volume_store import VolumeStore
from innkeeper.host.drivers.registry import DriverRegistry
from innkeeper.host.file_changes import FileChanges
from innkeeper.host.fleet import Fleet
from innkeeper.host.linux.command import CommandFailed
from innkeeper.host.network.network import Network
from innkeeper.host.turns import Turns
from innkeeper.vitals import Vitals

MIB = 1_048_576
SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class HostReadings:
    """The parts of a running daemon that have something to say."""

    fleet: Fleet
    drivers: DriverRegistry
    admission: Admission
    turns: Turns
    network: Network
    disks: DiskPool
    volumes: VolumeStore
    scanner: ChangeScanner
    changes: FileChanges
    vitals: Vitals

    async def __call__(self) -> Iterable[Reading]:
        """All readings, now."""
        return [
            *self._queues(),
            gauge(
                "admission_memory_limit_bytes",
                "Memory that guests may be promised.",
                self.admission.memory_limit_mb() * MIB,
            ),
            gauge(
                "admission_memory_committed_bytes",
                "Memory that guests are promised, frozen ones counted as admission does.",
                committed_mb(self.fleet.loads()) * MIB,
            ),
            *self._network(),
            *self._names(),
            *await self._packets(),
            gauge("disk_pool_free_bytes", "Room for new data on guests' disks.", self.disks.free_bytes()),
            gauge("disks", "Guests' disks.", len(self.disks.disks())),
            *await asyncio.to_thread(self._volumes),
            counter(
                "scans_saved", "Scans that were not needed because nothing had been written.", self.changes.scans_saved
            ),
            counter(
                "scanner_starts",
                "Processes that were started to scan: more than one means that one died.",
                self.scanner.started,
            ),
            *self.vitals.readings(),
        ]

    def _volumes(self) -> list[Reading]:
        found = self.volumes.all()
        return [
            gauge("volumes", "Volumes, attached or not.", len(found)),
            gauge(
                "volume_used_bytes",
                "What volumes take, blocks that they share with others included.",
                sum(volume.used_bytes for volume in found),
            ),
        ]

    def capacity(self) -> dict[str, Any]:
        """See DescribeCapacity."""
        loads = self.fleet.loads()
        warm = [Load(machine.record.shape.memory_mb, machine.frozen) for machine in self.fleet.warm.machines()]
        return {
            "memory_mb": total_memory_mb(),
            "memory_reserve_mb": self.admission.memory_reserve_mb,
            "memory_overcommit": self.admission.memory_overcommit,
            "memory_limit_mb": self.admission.memory_limit_mb(),
            "memory_committed_mb": committed_mb(loads),
            "memory_warm_mb": committed_mb(warm),
            "disk_free_mb": self.disks.free_bytes() // MIB,
            "disk_reserve_mb": self.admission.disk_reserve_mb,
            "disk_pool_mb": self.disks.total_bytes() // MIB,
            "slots": self.network.plan.capacity,
            "slots_used": len(self.network.in_use),
            "starts_waiting": self.fleet.waiting_starts,
            "executions_waiting": self.turns.waiting,
        }

    def _queues(self) -> list[Reading]:
        machines = self.fleet.machines()
        drivers: dict[str, float] = {offer.driver: 0 for offer in self.drivers.offers()}
        for machine in self.fleet.held():
            drivers[machine.record.driver] += 1
        terminals = [one for machine in machines for one in machine.terminals.values()]
        return [
            by_label(
                "gauge",
                "guests",
                "Guests of instances by whether they have processor time.",
                "state",
                {
                    "running": sum(not machine.frozen for machine in machines),
                    "frozen": sum(machine.frozen for machine in machines),
                },
            ),
            by_label("gauge", "machines", "Machines of instances and warm pools by their driver.", "driver", drivers),
            Reading(
                "warm_guests",
                "gauge",
                "Guests of warm pools, by whom they are for: how many there should be and are.",
                tuple(
                    ({"kind": kind, "state": state}, count) for (kind, state), count in self.fleet.warm.counts().items()
                ),
            ),
            gauge("terminals", "Terminals whose program runs.", sum(one.alive for one in terminals)),
            gauge("terminal_viewers", "Clients that look at terminals.", sum(len(one.viewers) for one in terminals)),
            gauge(
                "starts_waiting", "Cold starts that are under way or wait for their turn.", self.fleet.waiting_starts
            ),
            gauge("executions_waiting", "Commands that wait for their turn to start.", self.turns.waiting),
        ]

    def _network(self) -> list[Reading]:
        used, ready = len(self.network.in_use), self.network.ready
        text = "Places on the network: handed out, made ahead, and how many the subnet has."
        return [
            by_label(
                "gauge",
                "network_slots",
                text,
                "state",
                {"used": used, "ready": ready, "total": self.network.plan.capacity},
            )
        ]

    def _names(self) -> list[Reading]:
        resolver = self.network.resolver
        counts = resolver.counts
        return [
            by_label(
                "counter",
                "dns_questions",
                "Questions of guests for names, by what became of them.",
                "outcome",
                dict(counts.outcomes),
            ),
            by_label(
                "counter",
                "dns_questions_dropped",
                "Questions that were not taken: a guest had too many open, or connections, or all guests together had.",
                "reason",
                dict(counts.dropped),
            ),
            counter(
                "dns_upstream_failures", "Tries of a name server that brought no answer.", resolver.upstream_failures
            ),
            gauge("dns_questions_in_flight", "Questions of guests that are being answered.", resolver.in_flight),
        ]

    async def _packets(self) -> list[Reading]:
        try:
            async with asyncio.timeout(SECONDS):
                found = await self.network.refused_packets()
        except (CommandFailed, InnkeeperError, OSError, TimeoutError):
            return []
        text = "Packets of guests that were refused by the egress policy, or dropped for a false sender or as too many questions, since the rules were loaded."
        return [
            by_label(
                "counter",
                "egress_refused_packets",
                text,
                "reason",
                {name: float(count) for name, count in found.items()},
            )
        ]
