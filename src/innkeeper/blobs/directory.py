"""Blobs in a directory: one file each, with its digest in a file beside it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from innkeeper.blobs.contract import Blob, BlobNotFoundError, BlobReader, validate_key

CHUNK_BYTES = 1_048_576
# Both begin with a dot, which no part of a key does, so they never meet a key.
_UNFINISHED = ".unfinished"
_INDEX = ".index"


class DirectoryBlobs:
    """Blobs under a directory of their own (see `Blobs`), which one process uses."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # Finishing and deleting replace an index entry and the content that it named: one at a time, or contents would be lost.
        self._lock = threading.Lock()
        for folder in (root, root / _UNFINISHED, root / _INDEX):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()

    async def put(self, key: str, chunks: AsyncIterable[bytes]) -> Blob:
        """See `Blobs.put`."""
        validate_key(key)
        digest = hashlib.sha256()
        size = 0
        unfinished = self._root / _UNFINISHED / uuid4().hex
        try:
            file = await asyncio.to_thread(_create, unfinished)
            try:
                async for chunk in chunks:
                    await asyncio.to_thread(_write, file, digest, chunk)
                    size += len(chunk)
                await asyncio.to_thread(os.fsync, file.fileno())
            finally:
                file.close()
            blob = Blob(key, size, digest.hexdigest())
            await asyncio.to_thread(self._finish, unfinished, blob)
        finally:
            unfinished.unlink(missing_ok=True)
        return blob

    async def stat(self, key: str) -> Blob:
        """See `Blobs.stat`."""
        validate_key(key)
        return await asyncio.to_thread(self._stat, key)

    @asynccontextmanager
    async def open(self, key: str, *, offset: int = 0, length: int | None = None) -> AsyncIterator[BlobReader]:
        """See `Blobs.open`."""
        validate_key(key)
        file, blob = await asyncio.to_thread(self._open, key)
        try:
            yield _Reader(file, blob, offset, blob.size_bytes if length is None else length)
        finally:
            file.close()

    async def delete(self, key: str) -> None:
        """See `Blobs.delete`."""
        validate_key(key)
        await asyncio.to_thread(self._delete, key)

    async def list_keys(self, prefix: str = "") -> list[str]:
        """See `Blobs.list_keys`."""
        return await asyncio.to_thread(self._list, prefix)

    def _index(self, key: str) -> Path:
        return self._root / _INDEX / hashlib.sha256(key.encode()).hexdigest()

    def _sweep(self) -> None:
        """Remove what a process that was killed left half done."""
        for path in (self._root / _UNFINISHED).iterdir():
            path.unlink()
        records = [_read_index(path) for path in (self._root / _INDEX).iterdir()]
        named = {record["content"] for record in records if record is not None}
        for path in self._root.iterdir():
            if path.is_file() and path.name not in named:
                path.unlink()

    def _finish(self, unfinished: Path, blob: Blob) -> None:
        with self._lock:
            self._replace(unfinished, blob)

    def _replace(self, unfinished: Path, blob: Blob) -> None:
        """The bytes get a name of their own, and then the index points to them: a reader finds old or new, never a mixture."""
        content = self._root / f"{blob.sha256}-{uuid4().hex[:8]}"
        unfinished.rename(content)
        index = self._index(blob.key)
        former = _read_index(index)
        fresh = unfinished.with_suffix(".index")
        record = {"key": blob.key, "size_bytes": blob.size_bytes, "sha256": blob.sha256, "content": content.name}
        try:
            with fresh.open("w") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(index)
        except BaseException:
            fresh.unlink(missing_ok=True)
            content.unlink(missing_ok=True)
            raise
        if former is not None:
            (self._root / former["content"]).unlink(missing_ok=True)

    def _stat(self, key: str) -> Blob:
        record = _read_index(self._index(key))
        if record is None:
            raise BlobNotFoundError
        return Blob(key, int(record["size_bytes"]), record["sha256"])

    def _open(self, key: str) -> tuple[BinaryIO, Blob]:
        # The content may be replaced between the two reads; then the index names the new one.
        for _ in range(10):
            record = _read_index(self._index(key))
            if record is None:
                break
            try:
                file = (self._root / record["content"]).open("rb")
            except FileNotFoundError:
                continue
            return file, Blob(key, int(record["size_bytes"]), record["sha256"])
        raise BlobNotFoundError

    def _delete(self, key: str) -> None:
        with self._lock:
            index = self._index(key)
            record = _read_index(index)
            if record is not None:
                index.unlink(missing_ok=True)
                (self._root / record["content"]).unlink(missing_ok=True)

    def _list(self, prefix: str) -> list[str]:
        records = [_read_index(path) for path in (self._root / _INDEX).iterdir()]
        return sorted(record["key"] for record in records if record is not None and record["key"].startswith(prefix))


class _Reader:
    def __init__(self, file: BinaryIO, blob: Blob, offset: int, length: int) -> None:
        self.blob = blob
        self._file = file
        self._offset = offset
        self._left = length

    async def chunks(self) -> AsyncIterator[bytes]:
        while self._left > 0:
            size = min(self._left, CHUNK_BYTES)
            piece = await asyncio.to_thread(os.pread, self._file.fileno(), size, self._offset)
            if not piece:
                return
            self._offset += len(piece)
            self._left -= len(piece)
            yield piece


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb", buffering=0)


def _write(file: BinaryIO, digest: hashlib._Hash, chunk: bytes) -> None:
    digest.update(chunk)
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


def _read_index(path: Path) -> dict[str, str] | None:
    try:
        record: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return record
