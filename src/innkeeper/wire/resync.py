"""How a link begins on a stream that has no connections, such as a virtio-serial port (docs/guest-protocol.md section 1)."""

from __future__ import annotations

import asyncio
import os
import socket

from innkeeper.wire.frames import ProtocolError

MAGIC = bytes.fromhex("e0d3efcfa780938dfff2ffb5b3b7f2f5d6fac4b489af93bbb6dfc493c7c989f4")
NONCE_BYTES = 16
# Of an honest agent at most what its kernel had taken from it for the link before.
MAX_DISCARDED_BYTES = 16_777_216
READ_BYTES = 65_536
# An agent answers in a millisecond. A guest that boots answers when it has got that far: meanwhile each RESET waits in QEMU's socket.
FIRST_PATIENCE_SECONDS = 1.0


def new_reset() -> bytes:
    """A RESET with a nonce of its own. No byte of it can be a frame's first one."""
    return MAGIC + bytes(byte | 0x80 for byte in os.urandom(NONCE_BYTES))


async def begin_link(
    connection: socket.socket, *, timeout_seconds: float, patience_seconds: float = FIRST_PATIENCE_SECONDS
) -> bytes:
    """Have the agent begin a new link on a connected, non-blocking socket; the first bytes of that link, which go to `Link.data_received` before its transport.

    Raises:
        TimeoutError: no answer within `timeout_seconds`.
        ProtocolError: the peer sent MAX_DISCARDED_BYTES, and no answer among them.
        OSError: the connection broke.

    """
    loop = asyncio.get_running_loop()
    discarded = 0
    async with asyncio.timeout(timeout_seconds):
        while True:
            # Another one each time: the agent answers all of them, and only behind the answer to the last one lies the last link.
            reset = new_reset()
            await loop.sock_sendall(connection, reset)
            deadline = loop.time() + patience_seconds
            patience_seconds *= 2
            tail = b""
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        piece = await loop.sock_recv(connection, READ_BYTES)
                except TimeoutError:
                    break
                if not piece:
                    raise ConnectionResetError("the port was closed")
                before, found, rest = (tail + piece).partition(reset)
                if found:
                    return rest
                tail = before[-len(reset) + 1 :]
                discarded += len(piece)
                if discarded > MAX_DISCARDED_BYTES:
                    raise ProtocolError("the peer begins no new link")
