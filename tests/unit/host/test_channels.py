"""Which bytes of a journal are stderr's: against a plain model, across restarts, and at the limit."""

from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from innkeeper.host import channels
from innkeeper.host.channels import STDERR, STDOUT, Channels
from innkeeper.host.journal import Journal, read_output, read_record

PIECES = st.lists(st.tuples(st.sampled_from([STDOUT, STDERR]), st.binary(min_size=1, max_size=9)), max_size=30)


def read(directory, journal, offset=0, step=1 << 20):
    """[(channel, bytes)] of a journal from an offset on, read in steps, neighbours joined."""
    kept = Channels(f"{directory}/{journal.record.execution_id}.channels")
    found = []
    while (piece := read_output(directory, journal.record, offset, step)).data:
        kept.refresh()
        for channel, data in kept.split(piece.offset, piece.data):
            if found and found[-1][0] == channel:
                found[-1] = (channel, found[-1][1] + data)
            else:
                found.append((channel, data))
        offset += len(piece.data)
    return found


def joined(pieces):
    found = []
    for channel, data in pieces:
        if found and found[-1][0] == channel:
            found[-1] = (channel, found[-1][1] + data)
        else:
            found.append((channel, data))
    return found


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(PIECES, st.integers(0, 30), st.integers(1, 7))
def test_outputs_come_back_apart_and_in_order(tmp_path, pieces, restart, step):
    directory = tmp_path
    journal = Journal(directory, uuid4())
    journal.begin()
    for number, (channel, data) in enumerate(pieces):
        if number == restart:
            journal.close()
            journal = Journal.resume(directory, journal._stem.rpartition("/")[2])
        journal.write(data, channel)
    assert read(directory, journal, step=step) == joined(pieces)
    assert journal.record.stderr_bytes == sum(len(data) for channel, data in pieces if channel == STDERR)
    journal.finish()
    journal.close()
    assert read_record(directory, journal.record.execution_id).stderr_bytes == journal.record.stderr_bytes


def test_a_change_that_was_noted_before_its_bytes_came_is_no_change_twice(tmp_path):
    """A daemon that was killed between the two: the guest sends the bytes again."""
    journal = Journal(tmp_path, uuid4())
    journal.begin()
    journal.write(b"out")
    journal._channels.switch(3, STDERR)
    journal.close()
    journal = Journal.resume(tmp_path, journal.record.execution_id)
    journal.write(b"err", STDERR)
    journal.write(b"out")
    journal.close()
    assert read(tmp_path, journal) == [(STDOUT, b"out"), (STDERR, b"err"), (STDOUT, b"out")]


def test_merged_output_leaves_no_file(tmp_path):
    journal = Journal(tmp_path, uuid4())
    journal.begin()
    journal.write(b"merged")
    journal.finish()
    journal.close()
    assert not list(tmp_path.glob("*.channels"))


def test_a_program_that_goes_to_and_fro_without_end_gets_one_output_and_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(channels, "MAX_SWITCHES", 4)
    journal = Journal(tmp_path, uuid4())
    journal.begin()
    for _ in range(5):
        journal.write(b"e", STDERR)
        journal.write(b"o", STDOUT)
    journal.close()
    assert journal.record.merged_from == 4
    assert b"".join(data for _, data in read(tmp_path, journal)) == b"eo" * 5
    assert Path(f"{journal._stem}.channels").stat().st_size == 4 * 8


@pytest.mark.parametrize("cut", [1, 7, 9])
def test_a_file_that_was_cut_short_is_read_as_far_as_it_goes(tmp_path, cut):
    journal = Journal(tmp_path, uuid4())
    journal.begin()
    for channel in (STDERR, STDOUT):
        journal.write(b"abc", channel)
    journal.close()
    path = Path(f"{journal._stem}.channels")
    path.write_bytes(path.read_bytes()[:cut])
    assert b"".join(data for _, data in read(tmp_path, journal)) == b"abcabc"
