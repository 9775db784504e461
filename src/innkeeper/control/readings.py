"""What the API process's metrics read of the control side, and of the hosts, when somebody asks."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

from innkeeper.control import hosts, tokens
from innkeeper.control.hosts import HostView
from innkeeper.control.room_entry import RoomEntry
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.host_verbs import ReadMetrics, to_wire
from innkeeper.core.instance import InstanceState
from innkeeper.core.leak import LeakKind
from innkeeper.core.metric import Reading, Rows, by_label, counter, families, gauge
from innkeeper.errors import InnkeeperError

if TYPE_CHECKING:
    from innkeeper.control.context import Control

HOST_SECONDS = 10.0
MIB = 1_048_576
_HOST_GAUGES = {
    "machines": ("host_machines", "Running guests of instances.", 1),
    "frozen": ("host_frozen", "Guests without processor time while they are idle.", 1),
    "memory_mb": ("host_memory_bytes", "Memory of the host.", MIB),
    "memory_committed_mb": (
        "host_memory_committed_bytes",
        "Memory promised to guests, frozen ones counting a quarter.",
        MIB,
    ),
    "disk_free_mb": ("host_disk_free_bytes", "Free disk for guests.", MIB),
    "leaked": ("host_leaked", "Resources that belong to no instance; must be 0.", 1),
}


async def read(control: Control) -> list[dict[str, Any]]:
    """Every family but those of HTTP, as `core.metric.families` spells them; a host's rows carry its name as the label `host`."""
    views = await hosts.list_hosts(control, tokens.operator_principal(control))
    told = await asyncio.gather(*(_ask(control, view) for view in views if view.reachable))
    found = families([*_control(control), *_hosts(views), *control.vitals.readings()])
    by_name = {family["name"]: family for family in found}
    for host_name, host_families in told:
        for family in host_families:
            known = by_name.setdefault(family["name"], {**family, "samples": []})
            known["samples"] += [
                [name, {**labels, "host": host_name}, value] for name, labels, value in family["samples"]
            ]
    return list(by_name.values())


async def _ask(control: Control, view: HostView) -> tuple[str, list[dict[str, Any]]]:
    try:
        answer = await control.bus.request(
            view.host.id, ReadMetrics.verb, to_wire(ReadMetrics()), timeout_seconds=HOST_SECONDS
        )
    except InnkeeperError:
        # Its gauge says so.
        return view.host.name, []
    return view.host.name, answer["families"]


def _control(control: Control) -> list[Reading]:
    load = control.database.load
    access = [share.is_public for share in control.shares]
    counted = [
        counter(f"control_{field.name}", str(field.metadata["text"]), float(getattr(control.metrics, field.name)))
        for field in dataclasses.fields(control.metrics)
    ]
    return [
        *counted,
        Reading("instances", "gauge", "Rooms and VMs by the state of their instance.", _instances(control)),
        gauge("instance_flights", "Rooms and VMs that are coming up or going down now.", len(control.flights)),
        by_label(
            "gauge",
            "shares",
            "Published ports, by who may reach them.",
            "kind",
            {"public": sum(access), "private": len(access) - sum(access)},
        ),
        gauge("port_connections", "Connections to guests' ports that are open.", len(control.port_connections)),
        by_label(
            "gauge",
            "write_behind_pending",
            "What waits to be written to the database beside requests.",
            "kind",
            control.later.pending(),
        ),
        gauge("database_writes_waiting", "Writes in the database's queue or under way.", load.waiting),
        counter("database_writes", "Writes that were answered.", load.writes),
        counter("database_write_seconds", "Time that callers waited for writes.", load.write_seconds),
        counter("database_transactions", "Transactions that held them.", load.transactions),
        counter("database_reads", "Reads that were answered.", load.reads),
        counter("database_read_seconds", "Time that callers waited for reads.", load.read_seconds),
        gauge(
            "bus_calls_in_flight",
            "Calls to hosts that have not ended; one per host is its stream of events.",
            control.bus.in_flight(),
        ),
        by_label(
            "counter",
            "background_failures",
            "Exceptions in the server's own loops.",
            "task",
            dict(control.tasks.failures),
        ),
    ]


def _instances(control: Control) -> Rows:
    """Every state of both kinds, with 0 where there is none."""
    found = Counter((entry.kind, entry.instance.state) for entry in control.live)
    return tuple(
        ({"kind": kind, "state": state.value}, float(found[kind, state]))
        for kind in (RoomEntry.kind, VmEntry.kind)
        for state in InstanceState
        if state is not InstanceState.DESTROYED
    )


def _hosts(views: list[HostView]) -> list[Reading]:
    def rows(field: str, factor: int) -> tuple[tuple[dict[str, str], float], ...]:
        return tuple(
            ({"host": view.host.name}, float(view.status[field]) * factor)
            for view in views
            if isinstance(view.status.get(field), (int, float))
        )

    def told(name: str, text: str, value: Any) -> Reading:
        return Reading(name, "gauge", text, tuple(({"host": view.host.name}, float(value(view))) for view in views))

    return [
        told("host_reachable", "Whether the host answers.", lambda view: view.reachable),
        told("host_draining", "Whether the host is being drained.", lambda view: view.host.draining),
        told("host_open_calls", "Requests that are going on in the guests of a host.", lambda view: view.open_calls),
        *(Reading(name, "gauge", text, rows(field, factor)) for field, (name, text, factor) in _HOST_GAUGES.items()),
        Reading("leaked_resources", "gauge", "What a host has and nobody uses; must be 0.", _leaks(views)),
    ]


def _leaks(views: list[HostView]) -> Rows:
    """Every kind of every host that answers, with 0 where there is none."""
    counts = {
        view.host.name: Counter(leak["kind"] for leak in view.status.get("leaks", ()))
        for view in views
        if view.reachable
    }
    return tuple(
        ({"host": name, "kind": kind.value}, float(count[kind.value]))
        for name, count in counts.items()
        for kind in LeakKind
    )
