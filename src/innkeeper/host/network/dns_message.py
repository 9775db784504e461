"""DNS packets of strangers, read in bounded time."""

from __future__ import annotations

import dnslib  # type: ignore[import-untyped]
from dnslib import RR, DNSHeader, DNSLabel, DNSQuestion, DNSRecord
from dnslib.buffer import BufferError as DNSBufferError  # type: ignore[import-untyped]

# RFC 1035: a name is at most 255 bytes, the closing zero included.
MAX_NAME_BYTES = 255
# Compressed names of real messages need two or three; each hop is work that two bytes of a packet buy.
MAX_POINTERS = 10


def read_message(packet: bytes, *, max_bytes: int, max_records: int) -> DNSRecord:
    """The message in `packet`, in time linear in its length. Raises ValueError for what is too large, or whatever dnslib raises for what is malformed.

    `max_records` bounds answer, authority and additional records together.
    """
    if len(packet) > max_bytes:
        raise ValueError(f"{len(packet)} bytes; {max_bytes} are read")
    buffer = _Buffer(packet)
    header = DNSHeader.parse(buffer)
    if header.q > 1 or header.a + header.auth + header.ar > max_records:
        raise ValueError(f"more than one question or {max_records} records")
    return DNSRecord(
        header,
        questions=[DNSQuestion.parse(buffer) for _ in range(header.q)],
        rr=[RR.parse(buffer) for _ in range(header.a)],
        auth=[RR.parse(buffer) for _ in range(header.auth)],
        ar=[RR.parse(buffer) for _ in range(header.ar)],
    )


class _Buffer(dnslib.DNSBuffer):  # type: ignore[misc]
    """Names as RFC 1035 means them. dnslib's own reader follows pointers to pointers by recursion and without a limit, and again for every name:
    a question of 2 KB takes it 90 ms, one of 64 KB three seconds, in which the daemon does nothing else.
    """

    offset: int

    def decode_name(self, last: int = -1) -> DNSLabel:
        """The name at the current offset, pointers followed."""
        labels: list[bytes] = []
        position, after, size, pointers = self.offset, -1, 1, 0
        while length := self._byte(position):
            if length >= 0xC0:
                target = (length & 0x3F) << 8 | self._byte(position + 1)
                pointers += 1
                if target >= position or pointers > MAX_POINTERS:
                    raise DNSBufferError("a pointer that leads forward, or too many of them")
                if after < 0:
                    after = position + 2
                position = target
                continue
            label = bytes(self.data[position + 1 : position + 1 + length])
            size += length + 1
            if length > 63 or len(label) != length or size > MAX_NAME_BYTES:
                raise DNSBufferError("a label or name that is too long or cut off")
            label.decode()  # as dnslib does: it writes names as text
            labels.append(label)
            position += length + 1
        self.offset = position + 1 if after < 0 else after
        return DNSLabel(labels)

    def _byte(self, position: int) -> int:
        if position >= len(self.data):
            raise DNSBufferError("the packet ends in a name")
        return int(self.data[position])
