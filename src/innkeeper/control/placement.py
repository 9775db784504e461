"""Which host a new instance goes to, and which of its drivers an instance gets."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING
from uuid import UUID

from innkeeper.control.host_table import HostEntry
from innkeeper.core import isolation
from innkeeper.core.image import Image, ImageStatus
from innkeeper.core.instance import Instance
from innkeeper.core.instance_spec import InstanceSpec
from innkeeper.core.isolation import AUTO, HOST_SEES_CHANGES, Offer, Rules, Wish
from innkeeper.errors import DriverNotOfferedError, HostDrainingError, NoHostError, UnavailableError
from innkeeper.settings import Settings

if TYPE_CHECKING:
    from innkeeper.control.context import Control

# Whatever a build needs, its guests' disks become layers: the host has to read them.
BUILD_NEEDS = frozenset({HOST_SEES_CHANGES})
# The driver of virtual machines, which alone take a volume that one has written.
MACHINES = "qemu"


def rules_of(settings: Settings) -> Rules:
    """What the server's settings say of isolation."""
    return Rules(settings.driver, settings.min_isolation, settings.tcg_counts_as_microvm)


def choose(control: Control, spec: InstanceSpec, *, host_id: UUID | None) -> HostEntry:
    """The host for a new instance: the one asked for, else the one with the fewest instances. A full host says so itself when it is asked.

    Raises:
        NoHostError: none is reachable.
        DriverNotOfferedError: none that is has a driver that isolates as the spec wants.
        HostDrainingError: those that do take no new instances now.

    """
    there = [entry for entry in _reachable(control) if host_id in (None, entry.host.id)]
    rules = rules_of(control.settings)
    able = [entry for entry in there if isolation.choose(spec.wish, rules, entry.offers) is not None]
    if there and not able:
        raise isolation.refusal(spec.wish, rules, _offers(there))
    return _least_used(control, able)


def offer_for(control: Control, host: HostEntry, spec: InstanceSpec, instance: Instance) -> Offer:
    """The driver for an instance's next machine on its host. Raises DriverNotOfferedError: none is as strong as the spec wants, or as the last one was."""
    rules = rules_of(control.settings)
    offer = isolation.choose(spec.wish, rules, host.offers, own=instance.isolation)
    if offer is None:
        raise isolation.refusal(spec.wish, rules, host.offers, own=instance.isolation)
    return offer


def require_offered(control: Control, wish: Wish) -> None:
    """Refuse what cannot be had, as far as that is known: while no host has been heard of, only what never can.

    Raises:
        InvalidRequestError: no host can ever satisfy it.
        DriverNotOfferedError: none does now.

    """
    rules = rules_of(control.settings)
    isolation.check(wish, rules)
    there = _reachable(control)
    if there and all(isolation.choose(wish, rules, entry.offers) is None for entry in there):
        raise isolation.refusal(wish, rules, _offers(there))


def choose_for_build(control: Control) -> tuple[HostEntry, Offer]:
    """The host and the driver for the guests of an image build: all on one, where the files of one are kept for the next.

    The server's default driver is no matter here, its minimum is. Raises NoHostError, DriverNotOfferedError.
    """
    rules = dataclasses.replace(rules_of(control.settings), driver=AUTO)
    wish = Wish(min_isolation="none")
    there = _reachable(control)
    offers = {entry.host.id: isolation.choose(wish, rules, entry.offers, needs=BUILD_NEEDS) for entry in there}
    able = {host: offer for host, offer in offers.items() if offer is not None}
    if there and not able:
        raise isolation.refusal(wish, rules, _offers(there), needs=BUILD_NEEDS)
    host = _least_used(control, [entry for entry in there if entry.host.id in able])
    return host, able[host.host.id]


def choose_for_volume(control: Control) -> HostEntry:
    """The host for a new volume. Raises NoHostError, HostDrainingError."""
    return _least_used(control, _reachable(control))


def offer_for_files(control: Control, host: HostEntry, *, guest_written: bool) -> Offer:
    """The driver for a guest in which a volume's files are read and written: not one that leaves the volume to virtual machines alone, if it is not so already.

    Raises DriverNotOfferedError.
    """
    rules = dataclasses.replace(rules_of(control.settings), driver=AUTO)
    wish = Wish(min_isolation="none")
    if not guest_written:
        offer = isolation.choose(wish, rules, host.offers, needs=BUILD_NEEDS)
        offer = offer or isolation.choose(wish, rules, host.offers)
        if offer is None:
            raise isolation.refusal(wish, rules, host.offers)
        return offer
    # By its name, in software too: whoever wrote it was allowed to be that.
    machines = [offer for offer in host.offers if HOST_SEES_CHANGES not in offer.capabilities]
    for named in (dataclasses.replace(wish, driver=offer.driver) for offer in machines):
        offer = isolation.choose(named, rules, machines)
        if offer is not None:
            return offer
    why = isolation.refusal(dataclasses.replace(wish, driver=MACHINES), rules, host.offers).message
    raise DriverNotOfferedError(f"A virtual machine has written the volume, and only one may read it: {why}")


def _reachable(control: Control) -> list[HostEntry]:
    reachable = set(control.bus.hosts())
    return [entry for entry in control.hosts if entry.host.id in reachable]


def _offers(entries: list[HostEntry]) -> list[Offer]:
    return [offer for entry in entries for offer in entry.offers]


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
