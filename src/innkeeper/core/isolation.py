"""The isolation ladder: which of a host's drivers a guest gets, or why none. Pure; the rules for people are in docs/security.md.

Nothing here ever takes less than was asked for: what cannot be had is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from innkeeper.core.instance import Isolation
from innkeeper.errors import DriverNotOfferedError, InvalidRequestError

# Weakest first.
LEVELS = ("none", "gvisor", "microvm")
AUTO = "auto"
# The level that each driver reaches at its best.
BEST_LEVEL: Mapping[str, str] = {"gvisor": "gvisor", "qemu": "microvm"}
DRIVERS = (AUTO, *BEST_LEVEL)
# QEMU's accelerator in software. QEMU's own security policy does not treat it as a boundary.
TCG = "tcg"
# A capability that use cases ask for (`host.drivers.contract.Capabilities`), and what it means to people.
HOST_SEES_CHANGES = "host_sees_changes"
_MEANS = {HOST_SEES_CHANGES: "whose guests' disks the host may read"}


@dataclass(frozen=True, slots=True)
class Offer:
    """A driver of a host: what separates its guests from the host, or None where it cannot run there, and why."""

    driver: str
    isolation: Isolation | None
    reason: str
    capabilities: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        """What guests have in common that isolate alike: the driver, of a VM with its accelerator."""
        accelerator = None if self.isolation is None else self.isolation.accelerator
        return self.driver if accelerator is None else f"{self.driver} {accelerator}"

    def to_wire(self) -> dict[str, Any]:
        """The JSON form."""
        told = None if self.isolation is None else asdict(self.isolation)
        return {
            "driver": self.driver,
            "isolation": told,
            "reason": self.reason,
            "capabilities": sorted(self.capabilities),
        }


def offer_from_wire(body: Mapping[str, Any]) -> Offer:
    """The offer of `Offer.to_wire`'s form."""
    told = body["isolation"]
    return Offer(
        str(body["driver"]),
        None if told is None else isolation_from_wire(told),
        str(body["reason"]),
        frozenset(str(name) for name in body["capabilities"]),
    )


def isolation_from_wire(told: Mapping[str, Any]) -> Isolation:
    """What a host says of a guest's isolation."""
    accelerator = told.get("accelerator")
    texts = {name: str(told.get(name, "")) for name in ("level", "driver", "platform", "reason")}
    return Isolation(**texts, accelerator=None if accelerator is None else str(accelerator))


@dataclass(frozen=True, slots=True)
class Wish:
    """What a profile or a VM asks for."""

    driver: str = AUTO
    min_isolation: str = "gvisor"

    def validate(self) -> None:
        """Raises InvalidRequestError, naming the field."""
        for name, choice, choices in (("driver", self.driver, DRIVERS), ("min_isolation", self.min_isolation, LEVELS)):
            if choice not in choices:
                raise InvalidRequestError(f"{name}: must be one of {', '.join(choices)}")


def wish_of(driver: str | None, min_isolation: str | None) -> Wish:
    """The wish of who may have left it open; an empty word is not that."""
    usual = Wish()
    return Wish(
        usual.driver if driver is None else driver, usual.min_isolation if min_isolation is None else min_isolation
    )


@dataclass(frozen=True, slots=True)
class Rules:
    """What the server says: the driver behind `auto`, the floor for everyone, and whether TCG counts as a microVM's isolation."""

    driver: str = AUTO
    min_isolation: str = "gvisor"
    tcg_counts: bool = False

    def level_of(self, isolation: Isolation) -> str:
        """The level that counts."""
        if isolation.accelerator == TCG:
            return "microvm" if self.tcg_counts else "none"
        return isolation.level

    def judged(self, isolation: Isolation) -> Isolation:
        """What is told of a guest: with the level that counts, and the reason where that is not the driver's own."""
        level = self.level_of(isolation)
        if isolation.accelerator != TCG:
            return isolation
        counts = "counted as a microVM by this server's setting" if self.tcg_counts else "no security boundary"
        return replace(isolation, level=level, reason=f"{isolation.reason}; TCG is {counts}")


def rank(level: str) -> int:
    """The place on the ladder; what is not known stands below everything."""
    return LEVELS.index(level) if level in LEVELS else -1


def check(wish: Wish, rules: Rules) -> None:
    """Refuse what no host can ever satisfy, by the request's own words or this server's.

    Raises:
        InvalidRequestError: naming the field.

    """
    wish.validate()
    named = _named(wish, rules)
    if named == AUTO:
        return
    best = BEST_LEVEL[named]
    if rank(wish.min_isolation) > rank(best):
        whose = "driver" if wish.driver == named else "server's default driver"
        raise InvalidRequestError(
            f"min_isolation: {wish.min_isolation!r} is more than the {whose} {named!r} gives, which is {best!r}"
        )
    if rank(rules.min_isolation) > rank(best):
        raise InvalidRequestError(
            f"driver: {named!r} gives {best!r}, and this server allows nothing below {rules.min_isolation!r}"
        )


def choose(
    wish: Wish,
    rules: Rules,
    offers: Iterable[Offer],
    *,
    own: Isolation | None = None,
    needs: frozenset[str] = frozenset(),
) -> Offer | None:
    """The driver that a guest gets on a host that makes these offers; None where none may be taken.

    `auto` is the server's default driver; where that is `auto` too, the strongest there is, never TCG. `own` is what an instance ran with before: it keeps
    its driver while that still suffices, and never gets a weaker one. `needs` are capabilities that the driver must have.
    """
    floor = max(rank(wish.min_isolation), rank(rules.min_isolation), -1 if own is None else rank(rules.level_of(own)))
    fit = [
        (rank(rules.level_of(offer.isolation)), offer)
        for offer in offers
        if offer.isolation is not None and needs <= offer.capabilities
    ]
    fit = [(level, offer) for level, offer in fit if level >= floor]
    if own is not None:
        for _, offer in fit:
            if offer.driver == own.driver:
                return offer
    named = _named(wish, rules)
    if named == AUTO:
        fit = [(level, offer) for level, offer in fit if not _in_software(offer)]
    else:
        fit = [(level, offer) for level, offer in fit if offer.driver == named]
    return max(fit, key=lambda one: one[0])[1] if fit else None


def refusal(
    wish: Wish,
    rules: Rules,
    offers: Sequence[Offer],
    *,
    own: Isolation | None = None,
    needs: frozenset[str] = frozenset(),
) -> DriverNotOfferedError:
    """Why none of all hosts' offers may be taken: the field, what was asked for, and what is offered."""
    named = _named(wish, rules)
    own_level = None if own is None else rules.level_of(own)
    runs = [offer for offer in offers if offer.isolation is not None and needs <= offer.capabilities]
    asked = max(wish.min_isolation, rules.min_isolation, key=rank)
    if own is not None and own_level is not None and rank(own_level) > rank(asked):
        problem = f"The instance ran as {own_level!r} on {own.driver}, and is not started on less"
    elif named != AUTO and not any(offer.driver == named for offer in runs):
        problem = f"driver: no host offers {named!r} now"
    else:
        whose = "" if rank(wish.min_isolation) >= rank(rules.min_isolation) else ", which is this server's minimum,"
        by = "" if named == AUTO else f" with the driver {named!r}"
        means = "".join(f" from a driver {_MEANS.get(need, need)}" for need in sorted(needs))
        problem = f"min_isolation: no host offers {asked!r}{whose} now{by}{means}"
    told = dict.fromkeys(_told(offer, rules) for offer in offers)
    return DriverNotOfferedError(f"{problem}; offered: {'; '.join(told) or 'nothing'}")


def _named(wish: Wish, rules: Rules) -> str:
    return rules.driver if wish.driver == AUTO else wish.driver


def _in_software(offer: Offer) -> bool:
    return offer.isolation is not None and offer.isolation.accelerator == TCG


def _told(offer: Offer, rules: Rules) -> str:
    if offer.isolation is None:
        return f"{offer.driver} cannot run ({offer.reason})"
    by_name = ", only by its name" if _in_software(offer) else ""
    return f"{offer.driver} ({rules.level_of(offer.isolation)}, on {offer.isolation.platform}{by_name})"
