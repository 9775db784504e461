"""`kill -9` at random instants of everything a server does: what was acknowledged is there afterwards, and nothing is left over."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from server_fixture import Server, fresh, server
from tests.faults import census
from tests.faults.building import BASE, Builder
from tests.faults.ledger import Standing
from tests.faults.victims import VICTIMS, come_back, kill
from tests.faults.workload import Client, working

LONG_KILLS = 50
CLIENTS = 3
# Once for each victim, at another instant of another mixture of requests each run; the seed is printed and repeats the choices.
SEED_VARIABLE = "STORM_SEED"


@pytest.fixture(scope="module")
def stormy(driver: str) -> Iterator[Server]:
    # Clients here come again when told to, as they must when a server was killed.
    settings = {"INNKEEPER_FREEZE_AFTER_SECONDS": "0.3", "INNKEEPER_ROOM_WAIT_SECONDS": "30"}
    with server("base", driver=driver, **settings) as running:
        yield running


def test_kills_at_random_instants(stormy: Server, driver: str) -> None:
    storm(stormy, VICTIMS[driver], count_each_time=False)


@pytest.mark.long
def test_fifty_kills_at_random_instants(stormy: Server, driver: str) -> None:
    storm(stormy, tuple(itertools.islice(itertools.cycle(VICTIMS[driver]), LONG_KILLS)), count_each_time=True)


def storm(running: Server, every: Sequence[str], *, count_each_time: bool) -> None:
    seed = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(1 << 32))
    print(f"{SEED_VARIABLE}={seed}")
    chance = random.Random(seed)
    api = running.api()
    profiles = [api.make_profile(warm_pool_size=2), api.make_profile(egress_policy={"mode": "none"})]
    guests = [Client(f"c{number}", profiles, random.Random(chance.random())) for number in range(CLIENTS)]
    builder = Builder(fresh("built"), random.Random(chance.random()))
    builder.prepare(running)
    clients: list[Client | Builder] = [*guests, builder]
    victims, kills = list(every), len(every)
    chance.shuffle(victims)
    cut_short: Counter[str] = Counter()
    slowest = 0.0
    for number, victim in enumerate(victims):
        for client in clients:
            client.may_break = victim in ("api", "daemon", "both")
        times = [time.monotonic()]
        with working(clients, running):
            time.sleep(chance.uniform(0.05, 2.0))
            cut_short.update(f"{victim} during {client.doing or 'nothing'}" for client in clients)
            killed = kill(running, victim, chance)
            # What is refused now, and what comes after it, belongs to the storm.
            time.sleep(chance.uniform(0.0, 0.5))
        if victim == "vm":
            # Which guest's it was is not known here.
            for book in (book for client in guests for book in client.books):
                book.lost_power()
        times.append(time.monotonic())
        come_back(running, victim)
        times.append(time.monotonic())
        slowest = max(slowest, times[2] - times[1])
        wrong = [line for client in clients for line in client.wrong]
        wrong += audit(running, guests, sync="vm" in every) + builder.audit(running)
        times.append(time.monotonic())
        # It waits until pools are full again.
        left = census.wait_for_none(running.home) if count_each_time or number + 1 == kills else []
        times.append(time.monotonic())
        storming, returning, auditing, counting = (after - before for before, after in itertools.pairwise(times))
        print(f"{victim:8} storm {storming:.1f} s, return {returning:.1f}, audit {auditing:.1f}, census {counting:.1f}")
        assert wrong == [] and left == [], f"seed {seed}, kill {number + 1}, {victim} {killed}: {wrong} {left}"
    for key, count in sorted(cut_short.items()):
        print(f"{count:4d} {key}")
    done = sum((client.done for client in clients), Counter[str]())
    books = [book for client in guests for book in client.books]
    print(f"{kills} kills; slowest return {slowest:.1f} s; {dict(sorted(done.items()))}")
    print(
        f"{len(books)} rooms, {sum(book.standing is Standing.GONE for book in books)} of them destroyed; "
        f"{sum(len(book.files) for book in books)} files and {sum(len(book.told) for book in books)} executions in the books"
    )
    for name in (*(image.name for image in builder.images), BASE):
        assert running.client().delete(f"/v1/images/{name}").status_code in (204, 404)
    for book in books:
        if book.standing is not Standing.GONE:
            assert book.room(running.client()).delete().status_code == 204
    assert census.wait_for_none(running.home) == []


def audit(running: Server, clients: list[Client], *, sync: bool) -> list[str]:
    """Every book against the server; with `sync` what was found outlives the guests from here on."""
    client = running.client()
    wrong = [line for owner in clients for book in owner.books for line in book.audit(client)]
    if sync:
        wrong += [line for owner in clients for book in owner.books for line in book.sync(client)]
    known = {(book.profile_id, book.room_id): book.standing for owner in clients for book in owner.books}
    for profile_id in {profile_id for profile_id, _ in known}:
        wrong += [
            f"a room that was destroyed, or never asked for, is listed: {row}"
            for row in client.get(f"/api/profile/{profile_id}/rooms").json()
            if known.get((profile_id, row["room_id"])) is not Standing.THERE
        ]
    return wrong
