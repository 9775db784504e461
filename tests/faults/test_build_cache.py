"""Kept steps that are to go while builds stand on them: the builds end as if nobody had asked, and what is kept is within its limit afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from server_fixture import Server, fresh, server, until
from tests.faults import census
from tests.faults.building import BASE, archive, content_of, context
from tests.faults.workload import events

# Two stages and several steps each, every one of which pushes all others over the limit of nothing.
DOCKERFILE = f"""\
FROM {BASE} AS first
RUN echo first > /first
COPY content /content
FROM {BASE}
RUN echo second > /second
RUN sleep {{pause}}
COPY --from=first /content /made
RUN cat /second
"""


@pytest.fixture(scope="module")
def without_cache() -> Iterator[Server]:
    with server("base", INNKEEPER_BUILD_CACHE_MB="0") as running:
        answer = running.client().put(f"/v1/images/{BASE}/archive", content=archive("base"))
        assert answer.status_code == 202, answer.text
        until(lambda: running.client().get(f"/v1/images/{BASE}").json()["status"] == "ready")
        yield running


def build(running: Server, content: str, pause: str, at_pause: threading.Event | None = None) -> tuple[str, int]:
    """Build an image of that content; its name, and how many steps were kept from earlier. Raises AssertionError: it failed."""
    name, kept = fresh("cached"), 0
    client: httpx2.Client = running.client()
    body = {"name": name, "dockerfile": DOCKERFILE.format(pause=pause)}
    answer = client.post("/v1/image-builds", json=body)
    assert answer.status_code == 201, answer.text
    path = f"/v1/image-builds/{answer.json()['id']}"
    assert client.put(f"{path}/context", content=context(content)).status_code == 204
    with client.stream("GET", f"{path}/events") as stream:
        for kind, said in events(stream):
            kept += kind == "step" and said["kept"]
            if kind == "step" and said["text"].startswith("RUN sleep") and at_pause is not None:
                at_pause.set()
            if kind == "end":
                assert said["status"] == "ready", said
    return name, kept


def steps(running: Server) -> list[Path]:
    return list((running.home / "host" / "pool" / "steps").iterdir())


def test_a_build_keeps_what_it_stands_on_whoever_collects(without_cache: Server) -> None:
    """With a limit of nothing, and with all of it collected in the middle: steps of the stage that is copied from, and of the one that is built."""
    at_pause = threading.Event()
    collected: list[int] = []

    def collect() -> None:
        at_pause.wait()
        collected.append(without_cache.inn("image", "gc", "--build-cache").returncode)

    collecting = threading.Thread(target=collect)
    collecting.start()
    try:
        name, kept = build(without_cache, "of the first stage", "2", at_pause)
    finally:
        at_pause.set()
        collecting.join()
    assert (kept, collected) == (0, [0])
    assert content_of(without_cache.client(), name) == "of the first stage"
    until(lambda: steps(without_cache) == [])
    # Nothing is kept, so all of it runs again.
    name, kept = build(without_cache, "another", "0")
    assert kept == 0
    assert content_of(without_cache.client(), name) == "another"
    until(lambda: steps(without_cache) == [])
    assert census.wait_for_none(without_cache.home) == []
