"""The isolation ladder: every combination of what is asked for, what the server says and what a host offers."""

from itertools import product

import pytest

from innkeeper.core.instance import Isolation
from innkeeper.core.isolation import (
    DRIVERS,
    HOST_SEES_CHANGES,
    LEVELS,
    Offer,
    Rules,
    Wish,
    check,
    choose,
    offer_from_wire,
    rank,
    refusal,
    wish_of,
)
from innkeeper.errors import InvalidRequestError

GVISOR = Offer(
    "gvisor",
    Isolation("gvisor", "gvisor", "systrap", "faster here"),
    "faster here",
    frozenset({"freeze", HOST_SEES_CHANGES}),
)
KVM = Offer("qemu", Isolation("microvm", "qemu", "kvm", "it works", "kvm"), "it works", frozenset({"freeze"}))
TCG = Offer("qemu", Isolation("microvm", "qemu", "tcg", "no /dev/kvm", "tcg"), "no /dev/kvm", frozenset({"freeze"}))
NO_QEMU = Offer("qemu", None, "QEMU is not installed")
NO_GVISOR = Offer("gvisor", None, "no platform runs")
HOSTS = {
    "gvisor": (GVISOR,),
    "gvisor, kvm": (GVISOR, KVM),
    "kvm, gvisor": (KVM, GVISOR),
    "gvisor, tcg": (GVISOR, TCG),
    "tcg, gvisor": (TCG, GVISOR),
    "kvm": (NO_GVISOR, KVM),
    "tcg": (NO_GVISOR, TCG),
    "gvisor, no qemu": (GVISOR, NO_QEMU),
    "nothing": (NO_GVISOR, NO_QEMU),
    "": (),
}
# Asked for (driver, at least), on which host: what it gets where the server says nothing but its usual minimum, gvisor.
USUAL = {
    ("auto", "none"): {"gvisor": GVISOR, "gvisor, kvm": KVM, "gvisor, tcg": GVISOR, "kvm": KVM, "tcg": None, "gvisor, no qemu": GVISOR},
    ("auto", "gvisor"): {"gvisor": GVISOR, "gvisor, kvm": KVM, "gvisor, tcg": GVISOR, "kvm": KVM, "tcg": None, "gvisor, no qemu": GVISOR},
    ("auto", "microvm"): {"gvisor": None, "gvisor, kvm": KVM, "gvisor, tcg": None, "kvm": KVM, "tcg": None, "gvisor, no qemu": None},
    ("gvisor", "none"): {"gvisor": GVISOR, "gvisor, kvm": GVISOR, "gvisor, tcg": GVISOR, "kvm": None, "tcg": None, "gvisor, no qemu": GVISOR},
    ("gvisor", "gvisor"): {"gvisor": GVISOR, "gvisor, kvm": GVISOR, "gvisor, tcg": GVISOR, "kvm": None, "tcg": None, "gvisor, no qemu": GVISOR},
    ("gvisor", "microvm"): {"gvisor": None, "gvisor, kvm": None, "gvisor, tcg": None, "kvm": None, "tcg": None, "gvisor, no qemu": None},
    ("qemu", "none"): {"gvisor": None, "gvisor, kvm": KVM, "gvisor, tcg": None, "kvm": KVM, "tcg": None, "gvisor, no qemu": None},
    ("qemu", "gvisor"): {"gvisor": None, "gvisor, kvm": KVM, "gvisor, tcg": None, "kvm": KVM, "tcg": None, "gvisor, no qemu": None},
    ("qemu", "microvm"): {"gvisor": None, "gvisor, kvm": KVM, "gvisor, tcg": None, "kvm": KVM, "tcg": None, "gvisor, no qemu": None},
}  # fmt: skip
RULES = [Rules(driver, floor, tcg_counts=counts) for driver, floor, counts in product(DRIVERS, LEVELS, (False, True))]
OWNS = (None, *(offer.isolation for offer in (GVISOR, KVM, TCG)))


@pytest.mark.parametrize("asked", list(USUAL), ids=" ".join)
def test_what_each_wish_gets(asked: tuple[str, str]) -> None:
    assert set(USUAL) == set(product(DRIVERS, LEVELS))
    for host, expected in USUAL[asked].items():
        assert choose(Wish(*asked), Rules(), HOSTS[host]) == expected, host
    for host in ("nothing", ""):
        assert choose(Wish(*asked), Rules(), HOSTS[host]) is None


def level_by_hand(offer: Offer, rules: Rules) -> str:
    if offer is TCG:
        return "microvm" if rules.tcg_counts else "none"
    return "microvm" if offer is KVM else "gvisor"


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_every_combination(rules: Rules) -> None:
    """What is taken is never less than anybody asked for; and nothing is refused that may be taken."""
    for driver, floor, offers, own in product(DRIVERS, LEVELS, HOSTS.values(), OWNS):
        wish = Wish(driver, floor)
        taken = choose(wish, rules, offers, own=own)
        own_offer = next((offer for offer in (GVISOR, KVM, TCG) if own is not None and offer.isolation == own), None)
        floors = [floor, rules.min_isolation]
        if own_offer is not None:
            floors.append(level_by_hand(own_offer, rules))
        strong = [
            offer
            for offer in offers
            if offer.isolation is not None and all(rank(level_by_hand(offer, rules)) >= rank(one) for one in floors)
        ]
        kept = [offer for offer in strong if own is not None and offer.driver == own.driver]
        named = rules.driver if driver == "auto" else driver
        allowed = kept or [
            offer for offer in strong if (offer is not TCG if named == "auto" else offer.driver == named)
        ]
        case = (driver, floor, [one.kind for one in offers], own)
        if not allowed:
            assert taken is None, case
            message = refusal(wish, rules, offers, own=own).message
            for offer in offers:
                # Whoever is refused reads what there is.
                assert (offer.reason if offer.isolation is None else offer.driver) in message, case
            continue
        assert taken in allowed, case
        assert taken is not None
        # The strongest of them, and the first of equals.
        ranks = [rank(level_by_hand(offer, rules)) for offer in allowed]
        assert taken == allowed[ranks.index(max(ranks))], case


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_what_can_never_be_is_refused_by_its_field(rules: Rules) -> None:
    for driver, floor in product(DRIVERS, LEVELS):
        wish = Wish(driver, floor)
        ever = any(choose(wish, rules, offers) is not None for offers in HOSTS.values())
        try:
            check(wish, rules)
        except InvalidRequestError as error:
            assert not ever
            field, _, text = error.message.partition(": ")
            assert field in ("driver", "min_isolation"), text
        else:
            assert ever


def test_refusals_name_the_field_what_was_asked_and_what_is_offered() -> None:
    offers = (GVISOR, NO_QEMU)
    assert refusal(Wish("qemu"), Rules(), (GVISOR,)).message == (
        "driver: no host offers 'qemu' now; offered: gvisor (gvisor, on systrap)"
    )
    assert refusal(Wish("qemu"), Rules(), offers).message == (
        "driver: no host offers 'qemu' now; offered: gvisor (gvisor, on systrap); qemu cannot run (QEMU is not installed)"
    )
    assert refusal(Wish(min_isolation="microvm"), Rules(), (GVISOR, TCG)).message == (
        "min_isolation: no host offers 'microvm' now; "
        "offered: gvisor (gvisor, on systrap); qemu (none, on tcg, only by its name)"
    )
    assert refusal(Wish(), Rules(min_isolation="microvm"), (GVISOR,)).message == (
        "min_isolation: no host offers 'microvm', which is this server's minimum, now; offered: gvisor (gvisor, on systrap)"
    )
    assert refusal(Wish("qemu", "none"), Rules(), (GVISOR, TCG)).message.startswith(
        "min_isolation: no host offers 'gvisor', which is this server's minimum, now with the driver 'qemu'; offered:"
    )
    assert refusal(Wish(), Rules(), (GVISOR,), own=KVM.isolation).message == (
        "The instance ran as 'microvm' on qemu, and is not started on less; offered: gvisor (gvisor, on systrap)"
    )
    assert refusal(Wish(), Rules(), ()).message.endswith("; offered: nothing")
    # Two hosts that offer the same are told once.
    assert refusal(Wish("qemu"), Rules(), (GVISOR, GVISOR)).message.count("systrap") == 1


def test_what_can_never_be_says_why() -> None:
    for wish, rules, message in (
        (Wish("gvisor", "microvm"), Rules(), "min_isolation: 'microvm' is more than the driver 'gvisor' gives, which is 'gvisor'"),
        (Wish("auto", "microvm"), Rules("gvisor"), "min_isolation: 'microvm' is more than the server's default driver 'gvisor' gives, which is 'gvisor'"),
        (Wish("gvisor"), Rules(min_isolation="microvm"), "driver: 'gvisor' gives 'gvisor', and this server allows nothing below 'microvm'"),
        (Wish("docker"), Rules(), "driver: must be one of auto, gvisor, qemu"),
        (Wish("auto", "much"), Rules(), "min_isolation: must be one of none, gvisor, microvm"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError) as refused:
            check(wish, rules)
        assert refused.value.message == message


def test_a_tcg_guest_is_told_as_what_it_counts_for() -> None:
    assert TCG.isolation is not None
    told = Rules().judged(TCG.isolation)
    assert (told.level, told.accelerator) == ("none", "tcg")
    assert told.reason == "no /dev/kvm; TCG is no security boundary"
    counted = Rules(tcg_counts=True).judged(TCG.isolation)
    assert counted.level == "microvm"
    assert "setting" in counted.reason
    # What a row says of a guest is judged anew when the setting changes.
    assert Rules(tcg_counts=True).level_of(told) == "microvm"
    assert Rules().level_of(counted) == "none"
    for offer in (GVISOR, KVM):
        assert offer.isolation is not None
        assert Rules(tcg_counts=True).judged(offer.isolation) == offer.isolation


def test_capabilities_are_asked_for() -> None:
    needs = frozenset({HOST_SEES_CHANGES})
    assert choose(Wish(), Rules(), HOSTS["kvm, gvisor"], needs=needs) == GVISOR
    assert choose(Wish(min_isolation="microvm"), Rules(), HOSTS["kvm, gvisor"], needs=needs) is None
    message = refusal(Wish(min_isolation="microvm"), Rules(), HOSTS["kvm, gvisor"], needs=needs).message
    assert "now from a driver whose guests' disks the host may read; offered: qemu (microvm, on kvm); gvisor" in message


def test_guests_of_one_kind_isolate_alike() -> None:
    assert {offer.kind for offer in (GVISOR, KVM, TCG)} == {"gvisor", "qemu kvm", "qemu tcg"}


def test_offers_travel_as_they_are() -> None:
    for offer in (GVISOR, KVM, TCG, NO_QEMU):
        assert offer_from_wire(offer.to_wire()) == offer


def test_an_unknown_level_is_below_everything() -> None:
    odd = Offer("gvisor", Isolation("superb", "gvisor", "x", ""), "")
    assert choose(Wish(min_isolation="none"), Rules(min_isolation="none"), (odd,)) is None


def test_what_is_left_open_is_usual() -> None:
    assert wish_of(None, None) == Wish() == Wish("auto", "gvisor")
    assert wish_of("qemu", None) == Wish("qemu", "gvisor")
    assert wish_of("", "none") == Wish("", "none")
