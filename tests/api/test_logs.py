"""Logs of VMs and rooms over HTTP: pages, cursors, streams that many follow, and what becomes of slow ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import UUID

import httpx2
import pytest

from innkeeper.control import logs
from innkeeper.control.live_table import Entry
from innkeeper.control.logs import LogGap
from innkeeper.core.log_line import LogLine, LogSource
from innkeeper.core.vm import parse_vm_id
from innkeeper.errors import RateLimitedError, UnavailableError

pytestmark = pytest.mark.anyio


@pytest.fixture
async def vm(api: Any) -> str:
    answer = await api.client.post("/v1/vms", json={})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["vm_id"])


def entry_of(api: Any, vm: str) -> Entry:
    found = api.world.control.live.by_instance(parse_vm_id(vm)[0])
    assert isinstance(found, Entry)
    return found


def frames(text: str) -> list[tuple[str | None, str, Any]]:
    """(id, event, data) of server-sent events; comments are none."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if fields:
            found.append((fields.get("id"), fields["event"], json.loads(fields["data"])))
    return found


async def test_the_newest_lines_and_those_after_a_cursor(api: Any, vm: str) -> None:
    path = f"/v1/vms/{vm}/logs"
    assert (await api.client.get(path)).json() == {"lines": [], "first": 1, "last": 0}
    host = api.world.host.logs
    host.write(entry_of(api, vm).instance.id, *(f"line {number}" for number in range(1, 251)))
    host.write(entry_of(api, vm).instance.id, "\x1b[2J\n\u2028", source=LogSource.STDERR)
    found = (await api.client.get(path)).json()
    assert [line["sequence"] for line in found["lines"]] == list(range(52, 252))
    assert (found["first"], found["last"]) == (1, 251)
    assert found["lines"][-1] == {
        "sequence": 251,
        "at": "1970-01-01T00:20:51Z",
        "source": "stderr",
        "level": "info",
        "message": "\x1b[2J\n\u2028",
    }
    # A host whose pages are short is asked again.
    host.page = 7
    assert (await api.client.get(path, params={"lines": 20})).json()["lines"] == found["lines"][-20:]
    page = (await api.client.get(path, params={"after": 100, "lines": 5})).json()
    assert [line["message"] for line in page["lines"]] == [f"line {number}" for number in range(101, 106)]
    assert (await api.client.get(path, params={"lines": 0})).json()["lines"] == []
    for wrong in ({"lines": 1_001}, {"lines": -1}, {"lines": "x"}, {"after": -1}, {"after": 2**60}):
        assert (await api.client.get(path, params=wrong)).status_code == 422, wrong


async def test_a_room_has_a_log_too(api: Any) -> None:
    made = await api.make_room()
    instance = made["instance_id"]
    entry = api.world.control.live.by_public_id(UUID(instance))
    api.world.host.logs.write(entry.instance.id, "hello")
    found = await api.client.get(f"/v1/rooms/{instance}/logs")
    assert [line["message"] for line in found.json()["lines"]] == ["hello"]


async def test_a_stream_begins_where_it_is_asked_to_and_ends_with_the_instance(api: Any, vm: str) -> None:
    path, entry, host = f"/v1/vms/{vm}/logs/stream", entry_of(api, vm), api.world.host.logs
    host.write(entry.instance.id, "one", "two", "three")
    async with asyncio.TaskGroup() as group:
        newest = group.create_task(api.client.get(path, params={"lines": 2}))
        resumed = group.create_task(api.client.get(path, headers={"Last-Event-ID": "1"}))
        after = group.create_task(api.client.get(path, params={"after": 3}))
        beyond = group.create_task(api.client.get(path, params={"after": 99}))
        await api.world.until(lambda: len(api.world.control.log_followers) == 4 and host.waiting[entry.instance.id])
        host.write(entry.instance.id, "four\r\n")
        await api.world.until(lambda: host.waiting[entry.instance.id])
        await api.client.delete(f"/v1/vms/{vm}")
        host.write(entry.instance.id)
    assert len(api.world.control.log_followers) == 0
    for task, expected in (
        (newest, ["two", "three", "four\r\n"]),
        (resumed, ["two", "three", "four\r\n"]),
        (after, ["four\r\n"]),
        (beyond, ["four\r\n"]),
    ):
        answer = task.result()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "\r" not in answer.text
        *told, last = frames(answer.text)
        assert last == (None, "end", {})
        assert [(number, name, data["message"]) for number, name, data in told] == [
            (str(4 - len(expected) + at), "log", message) for at, message in enumerate(expected, 1)
        ]
    for wrong in ("x", "-1", "٣", "1" * 17):
        assert (await api.client.get(path, headers={"Last-Event-ID": wrong.encode()})).status_code in (404, 422)
    assert (await api.client.get(path)).status_code == 404


async def take(found: AsyncIterator[list[LogLine] | LogGap], last: int) -> list[int | LogGap]:
    """The sequences and gaps up to a line."""
    told: list[int | LogGap] = []
    async for one in found:
        told += [one] if isinstance(one, LogGap) else [line.sequence for line in one]
        if told[-1] == last:
            break
    return told


async def test_two_hundred_follow_one_log_and_the_host_is_asked_by_one(
    api: Any, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, entry, host = api.world.control, entry_of(api, vm), api.world.host.logs
    monkeypatch.setattr(logs, "FOLLOWERS_MAX", 200)
    found = [await logs.follow(control, entry, sequence=None) for _ in range(200)]
    following = [asyncio.ensure_future(take(one, 30)) for one in found]
    await api.world.until(lambda: len(control.log_followers) == 200 and host.waiting[entry.instance.id] == 1)
    with pytest.raises(RateLimitedError):
        await logs.follow(control, entry, sequence=0)
    assert (await api.client.get(f"/v1/vms/{vm}/logs/stream")).status_code == 429
    # One who leaves while all wait takes nobody along.
    gone = following.pop()
    gone.cancel()
    await asyncio.wait([gone])
    followed = control.log_followers._followed[entry.instance.id]
    asked = len(api.world.host.asked)
    for number in range(1, 31):
        host.write(entry.instance.id, f"line {number}")
        await asyncio.sleep(0)
    for told in await asyncio.gather(*following):
        assert told == list(range(1, 31))
    # Not one question per follower and line.
    assert len(api.world.host.asked) - asked <= 31
    for one in found:
        await one.aclose()
    assert len(control.log_followers) == 0
    assert followed._task.done()


async def test_a_slow_follower_gets_every_line_that_is_kept_and_a_gap_where_none_is(
    api: Any, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, entry, host = api.world.control, entry_of(api, vm), api.world.host.logs
    monkeypatch.setattr(logs, "SHARED_BYTES", 5 * (logs.LINE_OVERHEAD_BYTES + 3))
    async with (
        aclosing(await logs.follow(control, entry, sequence=0)) as slow,
        aclosing(await logs.follow(control, entry, sequence=0)) as fast,
    ):
        first = asyncio.ensure_future(anext(slow))
        quick = asyncio.ensure_future(take(fast, 400))
        await api.world.until(lambda: host.waiting[entry.instance.id] == 1)
        host.write(entry.instance.id, "000")
        await first
        for number in range(2, 401):
            host.write(entry.instance.id, f"{number:03}")
        assert await quick == list(range(1, 401))
        followed = control.log_followers._followed[entry.instance.id]
        await api.world.until(lambda: followed._last == 400)
        assert len(followed._lines) == 5
        assert await take(slow, 400) == list(range(2, 401))
    async with aclosing(await logs.follow(control, entry, sequence=10)) as late:
        del host.lines[entry.instance.id][:390]
        assert await take(late, 400) == [LogGap(11, 390), *range(391, 401)]


async def test_a_host_that_goes_away_ends_the_streams_with_an_error(api: Any, vm: str) -> None:
    entry, host = entry_of(api, vm), api.world.host.logs
    host.write(entry.instance.id, "one")
    async with asyncio.TaskGroup() as group:
        streams = [group.create_task(api.client.get(f"/v1/vms/{vm}/logs/stream")) for _ in range(3)]
        # One that waits, for all of them, and each has asked for what was there before.
        await api.world.until(lambda: host.waiting[entry.instance.id] and host.paged == 3)
        host.error = UnavailableError("The host is not reachable")
        host.write(entry.instance.id, "two")
    for task in streams:
        names = [name for _, name, _ in frames(task.result().text)]
        assert names[0] == "log" and names[-1] == "error"
        assert frames(task.result().text)[-1][2]["code"] == "service_unavailable"
    refused: httpx2.Response = await api.client.get(f"/v1/vms/{vm}/logs")
    assert refused.status_code == 503
    host.error = None
    # Whoever comes again, with what it saw last, misses nothing.
    async with aclosing(await logs.follow(api.world.control, entry, sequence=1)) as again:
        assert await take(again, 2) == [2]
