"""What is kept of an instance's executions: the newest, within limits, and looked through seldom."""

import os
from types import SimpleNamespace
from uuid import uuid4

import pytest

from innkeeper.host import executions, kept_executions
from innkeeper.host.execution import Execution
from innkeeper.host.executions import Executions
from innkeeper.host.journal import Journal
from innkeeper.host.kept_executions import Headroom, beyond_limits, prune, size_of
from innkeeper.host.metrics import HostMetrics
from innkeeper.host.turns import Turns

pytestmark = pytest.mark.anyio


def finished(directory, count, size=20):
    ids = []
    for number in range(count):
        execution_id = uuid4()
        one = Journal(directory, execution_id)
        one.begin()
        one.write(bytes(size))
        one.finish()
        one.close()
        ids.append(str(execution_id))
        for path in directory.glob(f"{execution_id}.*"):
            os.utime(path, (number, number))
    return ids


def left(directory):
    return {path.name.partition(".")[0] for path in directory.iterdir()}


def test_the_oldest_go_first_and_those_that_run_stay(tmp_path):
    ids = finished(tmp_path, 6)
    prune(tmp_path, keep=frozenset({ids[0]}), max_executions=3)
    assert left(tmp_path) == {ids[0], ids[4], ids[5]}
    prune(tmp_path, keep=frozenset(), max_executions=3)
    assert left(tmp_path) == {ids[0], ids[4], ids[5]}


def test_bytes_count_too(tmp_path):
    ids = finished(tmp_path, 4)
    size = size_of(ids[0], tmp_path)
    assert size == sum(path.stat().st_blocks * 512 for path in tmp_path.glob(f"{ids[0]}.*")) > 0
    prune(tmp_path, keep=frozenset(), max_bytes=2 * size)
    assert left(tmp_path) == set(ids[2:])


def test_a_file_that_vanishes_while_others_are_counted_is_no_fault(tmp_path, monkeypatch):
    ids = finished(tmp_path, 2)
    entries = list(os.scandir(tmp_path))
    for path in tmp_path.glob(f"{ids[0]}.*"):
        path.unlink()
    monkeypatch.setattr(kept_executions.os, "scandir", lambda _: iter(entries))
    prune(tmp_path, keep=frozenset(), max_executions=1)
    assert left(tmp_path) == {ids[1]}


def test_what_may_still_come_is_what_is_left_and_a_sixteenth(tmp_path):
    ids = finished(tmp_path, 5)
    size = size_of(ids[0], tmp_path)
    excess = beyond_limits(tmp_path, tmp_path / "absent", keep=frozenset(), max_executions=3, max_bytes=4 * size)
    assert set(excess.sizes) == set(ids[:2])
    assert excess.headroom == Headroom(kept_executions.OVER_EXECUTIONS, size + kept_executions.OVER_BYTES)
    for _ in range(kept_executions.OVER_EXECUTIONS):
        assert not excess.headroom.used_up
        excess.headroom.take(0)
    assert excess.headroom.used_up
    much = Headroom()
    much.take(kept_executions.UNSEEN_BYTES)
    assert much.used_up


class Machine:
    """As far as the end of a command needs one."""

    def __init__(self):
        self.id, self.journals, self.headroom, self.begun = "m", {}, Headroom(), []
        self.record = SimpleNamespace(instance_id=uuid4())

    def start_task(self, work):
        self.begun.append(work)


@pytest.fixture
def looked(monkeypatch):
    """What was looked through; an instance keeps 30 executions, and 20 more until it is looked at again."""
    found = []

    def noted(*folders, **limits):
        found.append(folders)
        return prune(*folders, **limits, max_executions=30, max_bytes=1 << 30)

    monkeypatch.setattr(executions, "prune", noted)
    monkeypatch.setattr(kept_executions, "OVER_EXECUTIONS", 20)
    return found


@pytest.fixture
def table(tmp_path):
    changes = SimpleNamespace(folder=lambda _: tmp_path / "changes")
    return Executions(changes=changes, turns=Turns(1), metrics=HostMetrics())


async def run(table, machine, journals, number):
    """A command from its record to what comes after it."""
    execution_id = finished(journals, 1, size=1_000)[0]
    for path in journals.glob(f"{execution_id}.*"):
        os.utime(path, (number, number))
    request = SimpleNamespace(execution_id=execution_id, instance_id=machine.record.instance_id)
    table._count(Execution(request, machine, None, journals))
    while machine.begun:
        await machine.begun.pop()


async def test_commands_that_write_much_have_the_folders_looked_through_seldom(tmp_path, looked, table):
    """Of a full instance that takes as long as many a neighbour's command, for each of a guest's own that says a little more than usual."""
    journals, machine = tmp_path / "journals", Machine()
    journals.mkdir()
    for number in range(500):
        await run(table, machine, journals, number)
        assert len(left(journals)) <= max(50, kept_executions.UNSEEN_EXECUTIONS)
    assert 1 < len(looked) < 50
    assert 30 <= len(left(journals)) <= 50


async def test_a_guest_that_starts_again_and_again_leaves_no_more_than_others(tmp_path, looked, table):
    journals = tmp_path / "journals"
    journals.mkdir()
    for start in range(40):
        machine = Machine()
        table.resume(machine, journals)
        for number in range(5):
            await run(table, machine, journals, start * 5 + number)
        assert len(left(journals)) <= 50
    assert len(looked) >= 39
