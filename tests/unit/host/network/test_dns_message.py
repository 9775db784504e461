import contextlib
import struct

import pytest
from dnslib import QTYPE, RR, A, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.host.network.dns_message import MAX_POINTERS, read_message

WIDE = {"max_bytes": 65_535, "max_records": 65_535}
QUESTION = struct.pack("!HH", 1, 1)


def packet(name: bytes, *, records: bytes = b"", count: int = 0) -> bytes:
    return struct.pack("!HHHHHH", 1, 0x0100, 1, count, 0, 0) + name + QUESTION + records


def record(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("!HHIH", 65_280, 1, 0, len(data)) + data


def pointer(target: int) -> bytes:
    return struct.pack("!H", 0xC000 | target)


def chain(length: int, *, more: int = 0) -> bytes:
    """A message with pointers to pointers `length` deep, and `more` records whose names start at the deep end."""
    links, target, start = b"", 12, 12 + 3 + 4 + 2 + 10
    for number in range(length):
        links, target = links + pointer(target), start + 2 * number
    body = record(pointer(12), links) + record(pointer(target), b"x") * more
    return packet(b"\x01a\0", records=body, count=1 + more)


@pytest.mark.parametrize("name", ["a.", "www.example.org.", "x" * 63 + ".test.", ".".join(["y" * 60] * 4) + "."])
def test_names_are_read_as_dnslib_reads_them(name: str) -> None:
    reply = DNSRecord.question(name).reply()
    for number in range(30):
        reply.add_answer(RR(name, QTYPE.A, rdata=A(f"8.8.8.{number}")))
    wire = reply.pack()
    assert read_message(wire, **WIDE).pack() == DNSRecord.parse(wire).pack() == wire


def test_pointers_to_pointers_end_soon() -> None:
    assert len(read_message(chain(MAX_POINTERS - 1, more=3), **WIDE).rr) == 4
    for wire in (chain(MAX_POINTERS + 1, more=1), chain(400, more=4_000)):
        with pytest.raises(Exception, match="too many of them"):
            read_message(wire, **WIDE)


@pytest.mark.parametrize(
    "name",
    [
        pointer(12),  # to itself
        pointer(14),  # forward
        b"\x01a" + pointer(12),  # round in a circle
        b"\x3f" + b"a" * 20,  # cut off
        b"\x40" + b"a" * 64 + b"\0",  # longer than a label
        (b"\x3f" + b"a" * 63) * 4 + b"\0",  # longer than a name
        b"\x01\xff\0",  # no text
        b"\xc0",
        b"",
    ],
)
def test_names_that_are_none(name: bytes) -> None:
    wire = packet(name) if name[-1:] == b"\0" else packet(name)[: 12 + len(name)]
    with pytest.raises(Exception):  # noqa: B017 - whatever dnslib raises; only that it ends matters
        read_message(wire, **WIDE)


def test_what_is_too_large_is_not_read() -> None:
    wire = packet(b"\x01a\0", records=record(pointer(12), b"x") * 5, count=5)
    assert len(read_message(wire, max_bytes=len(wire), max_records=5).rr) == 5
    with pytest.raises(ValueError, match="records"):
        read_message(wire, max_bytes=len(wire), max_records=4)
    with pytest.raises(ValueError, match="bytes"):
        read_message(wire, max_bytes=len(wire) - 1, max_records=5)
    with pytest.raises(ValueError, match="question"):
        read_message(wire[:4] + b"\0\2" + wire[6:], **WIDE)


@given(st.binary(max_size=300), st.integers(0, 80))
def test_a_damaged_message_is_read_or_refused(noise: bytes, place: int) -> None:
    wire = chain(5, more=3)
    with contextlib.suppress(Exception):
        read_message(wire[:place] + noise + wire[place + len(noise) :], **WIDE)
