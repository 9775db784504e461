"""Which bytes of an execution's journal were written to stderr.

Both outputs share the journal, in the order in which they came. `<execution>.channels` beside it has eight bytes for every change from one to the other:
the offset, doubled, and 1 more where stderr begins. An execution whose outputs were merged has none.
"""

from __future__ import annotations

import array
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator

STDOUT = 1
STDERR = 2
# 8 MiB of entries. A program that goes to and fro more often gets the rest of its output as one.
MAX_SWITCHES = 1_048_576
_ENTRY_BYTES = 8


class ChannelWriter:
    """Notes the changes of one execution."""

    __slots__ = ("_count", "_file", "_path", "channel", "merged_from")

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: int | None = None
        self._count = 0
        self.channel = STDOUT
        # From this offset on everything counts as what was written last.
        self.merged_from: int | None = None

    @classmethod
    def resume(cls, path: str) -> ChannelWriter:
        """The writer of an execution that an earlier daemon began."""
        writer = cls(path)
        entries = Channels(path)
        entries.refresh()
        writer._count = len(entries.switches)
        if entries.switches:
            writer.channel = STDERR if entries.switches[-1] & 1 else STDOUT
        return writer

    def switch(self, offset: int, channel: int) -> None:
        """From `offset` on it is the other channel's. Raises OSError when the host's disk is full."""
        if self._count >= MAX_SWITCHES:
            self.merged_from = offset if self.merged_from is None else self.merged_from
            return
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # At its own place, so that one which was cut short by a full disk is written over.
        os.pwrite(self._file, (offset << 1 | (channel - 1)).to_bytes(_ENTRY_BYTES, "little"), self._count * 8)
        self._count += 1
        self.channel = channel

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Channels:
    """Tells the channels of bytes that were read from a journal."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.switches = array.array("Q")

    def refresh(self) -> None:
        """Learn what was noted since the last time."""
        try:
            with open(self._path, "rb") as file:  # noqa: PTH123
                file.seek(len(self.switches) * _ENTRY_BYTES)
                more = file.read()
        except FileNotFoundError:
            return
        read = array.array("Q", more[: len(more) - len(more) % _ENTRY_BYTES])
        if sys.byteorder == "big":
            read.byteswap()
        self.switches.extend(read)

    def split(self, offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(channel, bytes) of data that begins at `offset`, in order."""
        at, end = offset, offset + len(data)
        number = bisect_right(self.switches, offset << 1 | 1)
        while at < end:
            channel = STDERR if number and self.switches[number - 1] & 1 else STDOUT
            until = min(end, self.switches[number] >> 1) if number < len(self.switches) else end
            if until > at:
                yield channel, data[at - offset : until - offset]
            at, number = max(at, until), number + 1

    def stderr_bytes(self, total: int) -> int:
        """How many of the first `total` bytes are stderr's."""
        count = 0
        for number, entry in enumerate(self.switches):
            if entry & 1:
                following = self.switches[number + 1] >> 1 if number + 1 < len(self.switches) else total
                count += max(0, min(following, total) - (entry >> 1))
        return count
