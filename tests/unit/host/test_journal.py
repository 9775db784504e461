from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from innkeeper.errors import ExecutionNotFoundError
from innkeeper.host import journal
from innkeeper.host.journal import (
    SKIPPED_BYTES_MAX,
    SKIPS_MAX,
    Journal,
    read_output,
    read_record,
    unfinished,
)

HEAD, TAIL = 16, 24
PIECES = st.lists(st.integers(0, 60), max_size=12)


@pytest.fixture(autouse=True, scope="module")
def small():
    patch = pytest.MonkeyPatch()
    patch.setattr(journal, "COMMANDS", journal.Kept(HEAD, TAIL))
    yield
    patch.undo()


def content(size):
    return bytes(at * 7 % 251 for at in range(size))


def written(directory, pieces, *, restart_at=-1):
    """A journal with pieces of these sizes; at `restart_at` another daemon goes on with it."""
    execution_id = uuid4()
    one = Journal(directory, execution_id)
    one.begin()
    whole, at = content(sum(pieces)), 0
    for number, size in enumerate(pieces):
        if number == restart_at:
            one.close()
            one = Journal.resume(directory, execution_id)
            assert one.record.total_bytes == at
        one.write(whole[at : at + size])
        at += size
    return one, execution_id, whole


def expected(whole, offset, limit):
    """What is kept of `whole`, said the simplest way: `(offset, bytes, gap)`."""
    total = len(whole)
    kept = [at for at in range(total) if at < HEAD or at >= total - TAIL]
    gap = (HEAD, total - TAIL) if total > HEAD + TAIL else None
    if gap and HEAD <= offset < gap[1]:
        offset = gap[1]
    offset = min(offset, total)
    last = offset
    while last < total and last - offset < limit and last in kept and (last < HEAD) == (offset < HEAD):
        last += 1
    return offset, whole[offset:last], gap


@settings(max_examples=150)
@given(PIECES, st.integers(0, 300), st.integers(0, 80), st.integers(-1, 11))
def test_every_slice_is_what_a_plain_list_would_give(tmp_path_factory, pieces, offset, limit, restart_at):
    directory = tmp_path_factory.getbasetemp() / "journals"
    directory.mkdir(exist_ok=True)
    one, _, whole = written(directory, pieces, restart_at=restart_at)
    found = read_output(directory, one.record, offset, limit)
    assert (found.offset, found.data, found.gap) == expected(whole, offset, limit)
    assert found.total_bytes == len(whole)
    one.close()


@settings(max_examples=50)
@given(PIECES, st.integers(1, 50))
def test_reading_on_gives_all_that_is_kept(tmp_path_factory, pieces, limit):
    directory = tmp_path_factory.getbasetemp() / "journals"
    directory.mkdir(exist_ok=True)
    one, execution_id, whole = written(directory, pieces)
    one.finish()
    record, got, offset = read_record(directory, execution_id), {}, 0
    while (piece := read_output(directory, record, offset, limit)).data:
        got.update({piece.offset + at: byte for at, byte in enumerate(piece.data)})
        offset = piece.offset + len(piece.data)
    kept = {at: byte for at, byte in enumerate(whole) if at < HEAD or at >= len(whole) - TAIL}
    assert (got, piece.offset) == (kept, len(whole))
    one.close()


def test_nothing_grows_beyond_the_limits(tmp_path):
    one, execution_id, _ = written(tmp_path, [50] * 20)
    sizes = {path.suffix: path.stat().st_size for path in tmp_path.glob(f"{execution_id}.*")}
    assert (sizes[".head"], sizes[".tail"]) == (HEAD, TAIL)
    one.close()


def test_skipped_bytes_read_as_zeros(tmp_path):
    one, _, _ = written(tmp_path, [4])
    one.skip_to(10)
    one.skip_to(3)
    one.write(b"xy")
    assert read_output(tmp_path, one.record, 0, 99).data == content(4) + bytes(6) + b"xy"
    one.close()


@pytest.mark.parametrize("skipped", [1, HEAD, HEAD + 7, TAIL - 1, TAIL, HEAD + TAIL, 9 * TAIL + 3])
@pytest.mark.parametrize("before", [0, 5, HEAD - 1, HEAD + 9, HEAD + 2 * TAIL + 5])
def test_a_skip_leaves_zeros_and_nothing_older(tmp_path, before, skipped):
    one, execution_id, _ = written(tmp_path, [before])
    one.skip_to(before + skipped)
    one.close()
    one = Journal.resume(tmp_path, execution_id)
    one.write(b"xyz")
    whole = content(before) + bytes(skipped) + b"xyz"
    for offset in range(len(whole)):
        piece = read_output(tmp_path, one.record, offset, 99)
        assert (piece.offset, piece.data, piece.gap) == expected(whole, offset, 99)
    one.close()


def test_a_skip_as_far_as_a_guest_may_claim_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "COMMANDS", journal.Kept(16 << 20, 48 << 20))
    one, execution_id, _ = written(tmp_path, [5])
    one.skip_to(1 << 40)
    one.close()
    assert sum(path.stat().st_blocks for path in tmp_path.glob(f"{execution_id}.*")) * 512 < 65_536


def test_the_record_and_its_end(tmp_path):
    one, execution_id, _ = written(tmp_path, [30])
    assert unfinished(tmp_path) == [execution_id]
    assert not read_record(tmp_path, execution_id).ended
    one.record.ended, one.record.exit_code = True, 3
    one.finish()
    one.finish()
    one.close()
    one.close()
    assert unfinished(tmp_path) == []
    record = read_record(tmp_path, execution_id)
    assert (record.ended, record.exit_code, record.total_bytes) == (True, 3, 30)
    assert Journal(tmp_path, execution_id).exists()
    assert not Journal(tmp_path, uuid4()).exists()
    with pytest.raises(ExecutionNotFoundError):
        read_record(tmp_path, uuid4())


def test_a_record_that_grows_after_the_end_is_written_over_the_first_one(tmp_path):
    one, execution_id, whole = written(tmp_path, [30])
    one.record.ended = True
    one.record.duration_ms = 1.25
    one.finish()
    one.write(content(HEAD + TAIL))
    one.record.duration_ms = None
    one.finish()
    one.record.lost = "x" * 100
    one.finish()
    one.close()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".head", ".tail"}
    assert read_record(tmp_path, execution_id) == one.record
    assert one.record.total_bytes == len(whole) + HEAD + TAIL


def test_a_record_that_a_killed_daemon_did_not_name_is_named(tmp_path):
    one, execution_id, _ = written(tmp_path, [30])
    one.record.ended, one.record.exit_code = True, 3
    one.finish()
    one.close()
    named = tmp_path / f"{execution_id}.json"
    named.rename(named.with_suffix(".running"))
    assert read_record(tmp_path, execution_id).exit_code == 3
    assert unfinished(tmp_path) == []
    assert read_record(tmp_path, execution_id).exit_code == 3
    assert [path.name for path in tmp_path.glob(f"{execution_id}.[jr]*")] == [named.name]


def test_a_damaged_mark_is_passed_over(tmp_path):
    (tmp_path / f"{uuid4()}.running").touch()
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("suffix", [".json", ".running"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}', "1 2 3", "x y"])
def test_a_damaged_record_is_none(tmp_path, suffix, text):
    execution_id = uuid4()
    (tmp_path / f"{execution_id}{suffix}").write_text(text)
    with pytest.raises(ExecutionNotFoundError):
        read_record(tmp_path, execution_id)


def test_files_that_are_gone_read_as_nothing(tmp_path):
    one, execution_id, _ = written(tmp_path, [60])
    for path in tmp_path.glob(f"{execution_id}.*"):
        path.unlink()
    assert read_output(tmp_path, one.record, 0, 10).data == b""
    assert read_output(tmp_path, one.record, 50, 10).data == b""
    one.close()


def test_a_guest_that_claims_too_often_or_too_much_to_have_dropped_output_is_not_believed(tmp_path):
    often, far = written(tmp_path, [])[0], written(tmp_path, [])[0]
    for number in range(1, SKIPS_MAX + 10):
        often.skip_to(number * 10)
        far.skip_to(number << 50)
    assert often.record.total_bytes == SKIPS_MAX * 10
    assert far.record.total_bytes == SKIPPED_BYTES_MAX
    # What comes then follows what is there.
    far.write(b"after")
    assert far.record.total_bytes == SKIPPED_BYTES_MAX + 5
    for one in (often, far):
        one.close()
