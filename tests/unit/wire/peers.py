"""Ends of a link without a socket: one that is fed by hand, and two that are joined."""

import asyncio
import json
import struct
from dataclasses import replace

from innkeeper.wire.frames import Kind, Limits, ProtocolError
from innkeeper.wire.link import Link

SMALL = Limits(
    max_payload=512, window=1_000, grant_step=250, max_streams=4, max_unread_messages=3, max_send_buffer=4_000
)

# One frame holds a whole window, as it does with the real limits; the send buffer is the bound elsewhere.
ROOMY = replace(SMALL, max_payload=1_000, max_send_buffer=100_000)


def raw(kind, stream_id=0, payload=b""):
    """A frame, made without the code under test. A dict is its JSON."""
    if isinstance(payload, dict):
        payload = json.dumps(payload).encode()
    return struct.pack(">IIB", len(payload), stream_id, int(kind)) + payload


def frames(data):
    """`[(kind, stream id, payload)]` of whole frames."""
    found = []
    while data:
        length, stream_id, kind = struct.unpack_from(">IIB", data)
        assert len(data) >= 9 + length
        found.append((Kind(kind), stream_id, data[9 : 9 + length]))
        data = data[9 + length :]
    return found


class Wire(asyncio.Transport):
    """A transport that keeps what is written; `stuck` is one whose peer does not read."""

    def __init__(self, *, stuck=False):
        super().__init__()
        self.written = bytearray()
        self.stuck = stuck
        self.reading = True
        self.aborted = False

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def write(self, data):
        self.written += data

    def get_write_buffer_size(self):
        return len(self.written) if self.stuck else 0

    def abort(self):
        self.aborted = True

    def take(self):
        """The frames written since the last call."""
        data = bytes(self.written)
        del self.written[:]
        return frames(data)


def fed(*, stuck=False, limits=SMALL, **options):
    """A link on a Wire: `(link, wire)`."""
    link, wire = Link(limits=limits, **options), Wire(stuck=stuck)
    link.connection_made(wire)
    return link, wire


class Joined(asyncio.Transport):
    """Carries bytes to another link in pieces; back-pressure as a socket's, at `high` bytes."""

    def __init__(self, own, high=600, piece=97):
        super().__init__()
        self.own, self.high, self.piece = own, high, piece
        self.peer = None
        self.reading = True
        self.buffer = bytearray()
        self.paused = self.gone = False

    def write(self, data):
        self.buffer += data
        if len(self.buffer) > self.high and not self.paused:
            self.paused = True
            self.own.pause_writing()
        asyncio.get_running_loop().call_soon(self.carry)

    def get_write_buffer_size(self):
        return len(self.buffer)

    def carry(self):
        if self.gone or not self.peer.reading or not self.buffer:
            return
        data = bytes(self.buffer[: self.piece])
        del self.buffer[: self.piece]
        if self.paused and len(self.buffer) <= self.high // 4:
            self.paused = False
            self.own.resume_writing()
        self.peer.own.data_received(data)
        asyncio.get_running_loop().call_soon(self.carry)

    def read(self, reading):
        """Let this end read, or not."""
        self.reading = reading
        asyncio.get_running_loop().call_soon(self.peer.carry)

    def abort(self):
        if not self.gone:
            self.gone = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self.own.connection_lost, None)
            loop.call_soon(self.peer.abort)


def joined(handlers, *, limits=ROOMY, **options):
    """Two links: `(opener, server)`, with their transports as `link._transport`."""
    opener, server = Link(limits=limits, opens_odd=True), Link(limits=limits, opens_odd=False, handlers=handlers)
    one, other = Joined(opener, **options), Joined(server, **options)
    one.peer, other.peer = other, one
    opener.connection_made(one)
    server.connection_made(other)
    return opener, server


async def settle(rounds=20):
    """Let everything that is ready run."""
    for _ in range(rounds):
        await asyncio.sleep(0)


def broken(link):
    """What the peer did wrong, or None when the link lives."""
    reason = link.closed.result() if link.closed.done() else None
    assert reason is None or isinstance(reason, ProtocolError), reason
    return None if reason is None else str(reason)
