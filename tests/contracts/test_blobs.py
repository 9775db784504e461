"""What every store of blobs must do."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from innkeeper.blobs.contract import BlobNotFoundError, Blobs
from innkeeper.blobs.directory import DirectoryBlobs
from innkeeper.errors import InvalidRequestError

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["directory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return DirectoryBlobs(tmp_path / "blobs")


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def content(blobs: Blobs, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
    async with blobs.open(key, offset=offset, length=length) as reader:
        return b"".join([piece async for piece in reader.chunks()])


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


async def test_put_stat_read(blobs: Blobs) -> None:
    blob = await blobs.put("a/b.bin", pieces(b"hello ", b"", b"world"))
    assert (blob.size_bytes, blob.sha256) == (11, hashlib.sha256(b"hello world").hexdigest())
    assert await blobs.stat("a/b.bin") == blob
    assert await content(blobs, "a/b.bin") == b"hello world"


async def test_ranges(blobs: Blobs) -> None:
    await blobs.put("k", pieces(b"0123456789"))
    assert await content(blobs, "k", offset=3, length=4) == b"3456"
    assert await content(blobs, "k", offset=8, length=100) == b"89"
    assert await content(blobs, "k", offset=10) == b""
    assert await content(blobs, "k", length=0) == b""


async def test_large_blobs_come_in_bounded_pieces(blobs: Blobs) -> None:
    await blobs.put("large", pieces(b"x" * 3_000_000))
    async with blobs.open("large") as reader:
        sizes = [len(piece) async for piece in reader.chunks()]
    assert sum(sizes) == 3_000_000
    assert max(sizes) <= 1_048_576


async def test_a_writer_that_fails_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await blobs.put("k", broken())
    with pytest.raises(BlobNotFoundError):
        await blobs.stat("k")
    assert not any(b"half" in data for data in contents(tmp_path))


async def test_a_writer_that_goes_away_leaves_the_former_content(blobs: Blobs) -> None:
    await blobs.put("k", pieces(b"old"))

    async def stuck() -> AsyncIterator[bytes]:
        yield b"new"
        await asyncio.Event().wait()

    writing = asyncio.create_task(blobs.put("k", stuck()))
    await asyncio.sleep(0.05)
    assert await content(blobs, "k") == b"old"
    writing.cancel()
    await asyncio.wait({writing})
    assert await content(blobs, "k") == b"old"


async def test_replacing(blobs: Blobs, tmp_path: Path) -> None:
    await blobs.put("k", pieces(b"first content"))
    async with blobs.open("k") as reader:
        await blobs.put("k", pieces(b"second"))
        assert b"".join([piece async for piece in reader.chunks()]) == b"first content"
    assert await content(blobs, "k") == b"second"
    assert not any(b"first content" in data for data in contents(tmp_path))


async def test_a_key_may_be_the_folder_of_another(blobs: Blobs) -> None:
    await blobs.put("a", pieces(b"1"))
    await blobs.put("a/b", pieces(b"2"))
    assert await content(blobs, "a") + await content(blobs, "a/b") == b"12"


async def test_delete_is_idempotent(blobs: Blobs) -> None:
    await blobs.put("k", pieces(b"x"))
    async with blobs.open("k") as reader:
        await blobs.delete("k")
        await blobs.delete("k")
        assert b"".join([piece async for piece in reader.chunks()]) == b"x"
    with pytest.raises(BlobNotFoundError):
        await blobs.stat("k")
    with pytest.raises(BlobNotFoundError):
        await content(blobs, "k")


async def test_list(blobs: Blobs) -> None:
    for key in ("b/2", "a", "b/1"):
        await blobs.put(key, pieces(b"x"))
    assert await blobs.list_keys() == ["a", "b/1", "b/2"]
    assert await blobs.list_keys("b/") == ["b/1", "b/2"]


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a/.b", "a\0b", "a b", "é", "x" * 513])
async def test_bad_keys(blobs: Blobs, key: str) -> None:
    for use in (blobs.put(key, pieces(b"x")), blobs.stat(key), blobs.delete(key), content(blobs, key)):
        with pytest.raises(InvalidRequestError):
            await use


async def test_a_killed_writer_leaves_nothing_for_the_next_start(blobs: Blobs, tmp_path: Path) -> None:
    await blobs.put("k", pieces(b"kept"))
    (tmp_path / "blobs" / ".unfinished" / "x").write_bytes(b"leaked")
    (tmp_path / "blobs" / "content-without-index").write_bytes(b"leaked")
    again = DirectoryBlobs(tmp_path / "blobs")
    assert await content(again, "k") == b"kept"
    assert b"leaked" not in contents(tmp_path)


async def test_concurrent_puts_of_one_key_end_with_one_of_them(blobs: Blobs, tmp_path: Path) -> None:
    bodies = [bytes([n]) * 100_000 for n in range(10)]
    await asyncio.gather(*(blobs.put("k", pieces(body)) for body in bodies))
    assert await content(blobs, "k") in bodies
    assert sum(data in bodies for data in contents(tmp_path)) == 1
