"""Blobs: large immutable things by key. Snapshots, uploads and exports go here; the database holds only their keys.

A blob is whole or absent: a writer that fails or goes away leaves nothing. Implementations: `directory`; the contract suite
runs on each.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from innkeeper.errors import InvalidRequestError, NotFoundError

KEY_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
KEY_MAX = 512


class BlobNotFoundError(NotFoundError):
    """There is no such blob."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored blob: its key, its size, and the SHA-256 of its bytes in hex."""

    key: str
    size_bytes: int
    sha256: str


class BlobReader(Protocol):
    """An open blob. It stays readable although the key is deleted meanwhile."""

    @property
    def blob(self) -> Blob:
        """What is open."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The bytes of the asked range, in pieces of at most 1 MiB."""
        ...


class Blobs(Protocol):
    """A store of blobs. Keys are folders and names of letters, digits, `.`, `_` and `-`; no part begins with a dot."""

    async def put(self, key: str, chunks: AsyncIterable[bytes]) -> Blob:
        """Store the bytes under the key, in place of any that were there, once all of them have come."""
        ...

    async def stat(self, key: str) -> Blob:
        """The blob of a key. Raises BlobNotFoundError."""
        ...

    def open(self, key: str, *, offset: int = 0, length: int | None = None) -> AbstractAsyncContextManager[BlobReader]:
        """Open a range of a blob; what lies beyond its end is left out. Raises BlobNotFoundError."""
        ...

    async def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is fine."""
        ...

    async def list_keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, sorted."""
        ...


def validate_key(key: str) -> None:
    """Check a key.

    Raises:
        InvalidRequestError: it is none.

    """
    if len(key) > KEY_MAX or not KEY_PATTERN.fullmatch(key):
        raise InvalidRequestError("blob key: folders and names of letters, digits, '.', '_' and '-'")
