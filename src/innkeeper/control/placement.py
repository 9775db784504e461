"""Which host a new instance goes to."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from innkeeper.control.host_table import HostEntry
from innkeeper.core.image import Image, ImageStatus
from innkeeper.core.instance_spec import InstanceSpec
from innkeeper.errors import HostDrainingError, NoHostError, UnavailableError

if TYPE_CHECKING:
    from innkeeper.control.context import Control

# Weakest first: a host serves a profile whose minimum is not above its own level.
ISOLATION_LEVELS = ("gvisor", "microvm")


def choose(control: Control, spec: InstanceSpec, *, host_id: UUID | None) -> HostEntry:
    """The host for a new instance: the one asked for, else the one with the fewest instances. A full host says so itself when it is asked.

    Raises:
        NoHostError: none is reachable and can isolate as strongly as the spec wants.
        HostDrainingError: those that do take no new instances now.

    """
    reachable = set(control.bus.hosts())
    able = [
        entry
        for entry in control.hosts
        if entry.host.id in reachable and _serves(entry, spec) and host_id in (None, entry.host.id)
    ]
    return _least_used(control, able)


def choose_for_build(control: Control) -> HostEntry:
    """The host for the guests of an image build: all on one, where the files of one are kept for the next. Raises NoHostError."""
    reachable = set(control.bus.hosts())
    return _least_used(control, [entry for entry in control.hosts if entry.host.id in reachable])


def _least_used(control: Control, able: list[HostEntry]) -> HostEntry:
    fit = [entry for entry in able if not entry.host.draining]
    if not fit:
        raise HostDrainingError if able else NoHostError
    if len(fit) == 1:
        return fit[0]
    load = {entry.host.id: 0 for entry in fit}
    for living in control.live:
        if living.instance.host_id in load:
            load[living.instance.host_id] += 1
    return min(fit, key=lambda entry: load[entry.host.id])


def usable_image(control: Control, spec: InstanceSpec) -> Image:
    """The spec's image, ready to be used.

    Raises:
        UnavailableError: it is being built, could not be built, or is not there.

    """
    image = control.images.resolve(spec.organization_id, spec.image)
    if image is not None and image.usable:
        return image
    if image is not None and image.status is ImageStatus.FAILED:
        raise UnavailableError(f"The image {spec.image!r} could not be built", retry_after_seconds=30)
    if image is not None and image.status is ImageStatus.BUILDING:
        raise UnavailableError(f"The image {spec.image!r} is still being built", retry_after_seconds=10)
    raise UnavailableError(f"The image {spec.image!r} is not there", retry_after_seconds=30)


def _serves(entry: HostEntry, spec: InstanceSpec) -> bool:
    if spec.driver not in ("auto", entry.driver) or entry.isolation_level not in ISOLATION_LEVELS:
        return False
    return ISOLATION_LEVELS.index(entry.isolation_level) >= ISOLATION_LEVELS.index(spec.min_isolation)
