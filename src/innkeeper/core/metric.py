"""A reading: a number, or a few by label, that is taken when somebody asks for metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Rows = tuple[tuple[dict[str, str], float], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """A family of Prometheus: its name without the prefix `innkeeper_`, what it is, and its rows. Sizes in bytes, times in seconds.

    The names and values of labels are few and known: never an instance, a room, a profile or an organization.
    """

    name: str
    kind: Literal["gauge", "counter"]
    text: str
    rows: Rows


def gauge(name: str, text: str, value: float) -> Reading:
    """A gauge without labels."""
    return Reading(name, "gauge", text, (({}, value),))


def counter(name: str, text: str, value: float) -> Reading:
    """A counter without labels; its name without `_total`."""
    return Reading(name, "counter", text, (({}, value),))


def by_label(kind: Literal["gauge", "counter"], name: str, text: str, label: str, values: dict[str, float]) -> Reading:
    """A family with one label."""
    return Reading(name, kind, text, tuple(({label: key}, value) for key, value in values.items()))


def families(readings: Iterable[Reading]) -> list[dict[str, Any]]:
    """The readings as `{"name", "type", "help", "samples": [[name, labels, value]]}`, as they travel from a host."""
    found = []
    for one in readings:
        sample = f"innkeeper_{one.name}" + ("_total" if one.kind == "counter" else "")
        samples = [[sample, labels, value] for labels, value in one.rows]
        found.append({"name": f"innkeeper_{one.name}", "type": one.kind, "help": one.text, "samples": samples})
    return found
