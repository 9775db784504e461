"""A file that is written through a pipe, by a writer that behaves and by some that do not."""

import errno
import os

import pytest

from innkeeper.host.linux import pipe_file
from innkeeper.host.linux.pipe_file import PIECE_BYTES, PipeFile

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def test_the_file_holds_what_every_holder_of_the_end_wrote(tmp_path):
    file = PipeFile(tmp_path / "file", limit_bytes=100)
    async with file.writing() as into:
        other = os.dup(into.fileno())
        into.write(b"first")
        into.close()
        os.write(other, b" second")
        os.close(other)
    assert (tmp_path / "file").read_bytes() == b"first second"
    assert file.taken == 12
    again = PipeFile(tmp_path / "file", limit_bytes=100)
    with pytest.raises(FileExistsError):
        async with again.writing():
            pass


async def test_too_much_is_not_taken(tmp_path, monkeypatch):
    file = PipeFile(tmp_path / "file", limit_bytes=PIECE_BYTES)
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        async with file.writing() as into:
            file.begin()
            with pytest.raises(BrokenPipeError):
                for _ in range(64):
                    into.write(b"x" * PIECE_BYTES)
    assert (tmp_path / "file").stat().st_size <= 2 * PIECE_BYTES


async def test_nothing_is_taken_before_it_is_wanted(tmp_path):
    file = PipeFile(tmp_path / "file", limit_bytes=4 * PIECE_BYTES)
    async with file.writing() as into:
        os.set_blocking(into.fileno(), False)
        written = 0
        while (more := into.write(b"x" * PIECE_BYTES)) is not None:
            written += more
        assert file.taken == 0 < written
        into.close()
        file.begin()
    assert (file.taken, (tmp_path / "file").stat().st_size) == (written, written)


async def test_a_writer_that_keeps_its_end_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pipe_file, "END_SECONDS", 0.05)
    kept = -1
    with pytest.raises(OSError, match="keeps its end"):
        async with PipeFile(tmp_path / "file", limit_bytes=1).writing() as into:
            kept = os.dup(into.fileno())
    with pytest.raises(BrokenPipeError):
        os.write(kept, b"x")
    os.close(kept)


async def test_nobody_waits_for_a_writer_when_the_block_fails(tmp_path):
    kept = -1
    with pytest.raises(ZeroDivisionError):
        async with PipeFile(tmp_path / "file", limit_bytes=1).writing() as into:
            kept = os.dup(into.fileno())
            raise ZeroDivisionError
    with pytest.raises(BrokenPipeError):
        os.write(kept, b"x")
    os.close(kept)
