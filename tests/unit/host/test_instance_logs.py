import asyncio
import errno
import os
from uuid import uuid4

import pytest

from innkeeper.core.log_line import LINE_CHARACTERS_MAX, LogSource, Severity
from innkeeper.host import instance_logs
from innkeeper.host.instance_logs import BURST_BYTES, RATE_BYTES_PER_SECOND, InstanceLogs

OUT = LogSource.STDOUT


class Clock:
    def __init__(self):
        self.seconds = 1_000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def logs(tmp_path, clock):
    return InstanceLogs(tmp_path, limit_bytes=1_048_576, now=clock, ticks=clock)


@pytest.fixture
def instance(logs):
    instance_id = uuid4()
    logs.begin(instance_id)
    return instance_id


def again(tmp_path, clock, **limits):
    """The logs as the next daemon finds them."""
    return InstanceLogs(tmp_path, limit_bytes=limits.get("limit_bytes", 1_048_576), now=clock, ticks=clock)


def everything(logs, instance_id, *, after=0, limit=7):
    found = []
    while lines := logs.read(instance_id, after=after, limit=limit).lines:
        found += lines
        after = lines[-1].sequence
    return found


def said(logs, instance_id, **where):
    return [line.message for line in everything(logs, instance_id, **where)]


def test_lines_come_back_in_order_with_time_source_and_level(logs, instance, clock):
    logs.note(instance, "started")
    clock.seconds += 5
    logs.append(instance, OUT, ["one", "two"])
    logs.append(instance, LogSource.STDERR, ["oh"])
    logs.note(instance, "out of memory", level=Severity.ERROR, source=LogSource.PLATFORM)
    assert [tuple(line.to_wire()) for line in everything(logs, instance)] == [
        (1, 1_000.0, "lifecycle", "info", "started"),
        (2, 1_005.0, "stdout", "info", "one"),
        (3, 1_005.0, "stdout", "info", "two"),
        (4, 1_005.0, "stderr", "warning", "oh"),
        (5, 1_005.0, "platform", "error", "out of memory"),
    ]
    page = logs.read(instance, after=3, limit=1)
    assert ([line.sequence for line in page.lines], page.first, page.last) == ([4], 1, 5)
    assert logs.read(instance, after=99, limit=5).lines == []


def test_hostile_text_stays_one_line_each(logs, instance, tmp_path, clock):
    hostile = ['"],["', "\0\x1b]0;title\x07", "\r", "\u2028\u2029\x85", "a\nb", "\\", "😀" * 10, ""]
    logs.append(instance, OUT, hostile)
    assert said(logs, instance) == hostile
    assert said(again(tmp_path, clock), instance) == hostile


def test_the_next_daemon_goes_on_with_the_sequence(logs, instance, tmp_path, clock):
    logs.append(instance, OUT, ["one", "two"])
    later = again(tmp_path, clock)
    later.append(instance, OUT, ["three"])
    assert [(line.sequence, line.message) for line in everything(later, instance)] == [
        (1, "one"),
        (2, "two"),
        (3, "three"),
    ]


@pytest.mark.parametrize("torn", [b"[1000.0,", b'[1000.0,"stdout","info","cut', b"\0" * 40])
def test_a_torn_last_line_is_dropped_and_the_next_one_is_whole(logs, instance, tmp_path, clock, torn):
    logs.append(instance, OUT, ["one", "two"])
    segment = next((tmp_path / str(instance)).iterdir())
    segment.write_bytes(segment.read_bytes() + torn)
    later = again(tmp_path, clock)
    assert said(later, instance) == ["one", "two"]
    later.append(instance, OUT, ["three"])
    assert [(line.sequence, line.message) for line in everything(again(tmp_path, clock), instance)][-1] == (3, "three")


def test_a_damaged_line_costs_that_line_alone(logs, instance, tmp_path, clock):
    logs.append(instance, OUT, ["one", "two", "three"])
    segment = next((tmp_path / str(instance)).iterdir())
    segment.write_bytes(segment.read_bytes().replace(b'"stdout","info","two"', b"\0" * 21))
    assert [(line.sequence, line.message) for line in everything(again(tmp_path, clock), instance)] == [
        (1, "one"),
        (3, "three"),
    ]


def test_what_is_kept_is_bounded_and_the_newest_stay(tmp_path, clock):
    limit = 64 * 1024
    logs, instance_id = again(tmp_path, clock, limit_bytes=limit), uuid4()
    logs.begin(instance_id)
    for number in range(2_000):
        clock.seconds += 1
        logs.append(instance_id, OUT, [f"{number} {'x' * 200}"])
    sizes = [path.stat().st_size for path in (tmp_path / str(instance_id)).iterdir()]
    assert limit / 2 < sum(sizes) <= limit
    page = logs.read(instance_id, after=0, limit=1)
    assert page.first > 1 and page.last == 2_000
    assert page.lines[0].sequence == page.first and page.lines[0].message.startswith(f"{page.first - 1} ")
    found = everything(logs, instance_id, limit=100)
    assert [line.sequence for line in found] == list(range(page.first, 2_001))
    assert everything(again(tmp_path, clock, limit_bytes=limit), instance_id, limit=33) == found


def test_pages_are_bounded_but_never_empty(logs, instance, clock):
    for _ in range(40):
        clock.seconds += 10
        logs.append(instance, OUT, ["\0" * LINE_CHARACTERS_MAX])
    page = logs.read(instance, after=logs.read(instance, after=0, limit=1).first - 1, limit=1_000)
    assert 1 <= len(page.lines) <= 2
    assert len(everything(logs, instance, limit=1_000)) == page.last - page.first + 1


def test_a_reader_that_jumps_back_and_forth_gets_what_it_asks_for(logs, instance):
    logs.append(instance, OUT, [str(number) for number in range(1, 101)])
    for after in (50, 10, 99, 0, 51, 50, 98, 1):
        assert [line.message for line in logs.read(instance, after=after, limit=2).lines] == [
            str(number) for number in range(after + 1, min(after + 3, 101))
        ]


def test_a_flood_is_dropped_and_counted(logs, instance, tmp_path, clock):
    line = "y" * 1_000
    for _ in range(20):
        logs.append(instance, OUT, [line] * 1_000)
    taken = sum(path.stat().st_size for path in (tmp_path / str(instance)).iterdir())
    assert taken <= 2 * 1_048_576 < BURST_BYTES
    kept = everything(logs, instance, limit=1_000)
    assert "lines are dropped" in kept[-1].message and kept[-1].source is LogSource.PLATFORM
    clock.seconds += BURST_BYTES / RATE_BYTES_PER_SECOND
    logs.append(instance, OUT, ["calm again"])
    *_, counted, calm = everything(logs, instance, limit=1_000)
    assert calm.message == "calm again"
    number, rest = counted.message.split(" ", 1)
    assert rest == "lines were dropped here" and counted.level is Severity.WARNING
    # Every line was kept or counted; two more are the store's own.
    assert int(number) == 20_000 - (calm.sequence - 3)


def test_empty_lines_cost_too(logs, instance):
    for _ in range(6):
        logs.append(instance, OUT, [""] * 10_000)
    assert logs.read(instance, after=0, limit=1).last < 50_000


@pytest.mark.parametrize("partly", [0, 30])
def test_a_full_disk_loses_lines_and_says_how_many(logs, instance, tmp_path, clock, monkeypatch, partly):
    logs.append(instance, OUT, ["before"])
    real = os.pwrite

    def full(descriptor, data, offset):
        if partly and (written := real(descriptor, bytes(data)[:partly], offset)) and not failing:
            failing.append(written)
            return written
        raise OSError(errno.ENOSPC, "full")

    failing = []
    monkeypatch.setattr(instance_logs.os, "pwrite", full)
    logs.append(instance, OUT, ["lost", "lost too"])
    logs.note(instance, "lost as well")
    monkeypatch.undo()
    assert said(again(tmp_path, clock), instance) == ["before"]
    logs.append(instance, OUT, ["after"])
    expected = ["before", "3 lines could not be written here", "after"]
    assert said(logs, instance) == said(again(tmp_path, clock), instance) == expected


def test_nothing_is_written_before_the_beginning_or_after_the_removal(logs, tmp_path):
    instance_id = uuid4()
    logs.append(instance_id, OUT, ["early"])
    logs.note(instance_id, "early")
    assert list(tmp_path.iterdir()) == []
    page = logs.read(instance_id, after=0, limit=5)
    assert (page.lines, page.first, page.last) == ([], 1, 0)
    logs.begin(instance_id)
    logs.note(instance_id, "now")
    (tmp_path / str(instance_id)).rename(tmp_path / "trash")
    logs.forget(instance_id)
    logs.note(instance_id, "late")
    assert [path.name for path in tmp_path.iterdir()] == ["trash"]
    assert logs.read(instance_id, after=0, limit=5).lines == []


def test_old_segments_go_and_the_sequence_stays(tmp_path, clock):
    logs, living, ended = again(tmp_path, clock, limit_bytes=16_384), uuid4(), uuid4()
    for instance_id in (living, ended):
        logs.begin(instance_id)
        for number in range(40):
            logs.append(instance_id, OUT, [f"{number:0200}"])
    for path in tmp_path.glob("*/*"):
        os.utime(path, (500, 500))
    logs.note(living, "new")
    kept = tmp_path / str(ended)

    def alive(instance_id):
        return instance_id == living

    assert logs.expire(100, living=alive) == 0
    assert logs.expire(1_000, living=alive) > 5
    assert not kept.exists()
    assert said(logs, living)[-1] == "new"
    last = logs.read(living, after=0, limit=1).last
    for path in tmp_path.glob("*/*"):
        os.utime(path, (500, 500))
    logs.expire(1_000, living=alive)
    for found in (logs, again(tmp_path, clock, limit_bytes=16_384)):
        assert found.read(living, after=0, limit=9) == instance_logs.LogPage([], last + 1, last)
    # Again, with nothing in it: what says the sequence stays.
    for path in tmp_path.glob("*/*"):
        os.utime(path, (500, 500))
    assert logs.expire(1_000, living=alive) == 0
    later = again(tmp_path, clock, limit_bytes=16_384)
    later.note(living, "goes on")
    assert [line.sequence for line in everything(later, living)] == [last + 1]


@pytest.mark.anyio
async def test_readers_wait_for_lines_and_for_the_end(logs, instance):
    logs.note(instance, "one")
    await asyncio.wait_for(logs.wait(instance, 0), 60)
    waiting = [asyncio.ensure_future(logs.wait(instance, 1)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(one.done() for one in waiting)
    waiting[0].cancel()
    logs.append(instance, OUT, ["two"])
    await asyncio.wait_for(asyncio.gather(*waiting[1:]), 60)
    last = asyncio.ensure_future(logs.wait(instance, 2))
    await asyncio.sleep(0)
    logs.forget(instance)
    await asyncio.wait_for(last, 60)
    assert logs._waiting == {}
