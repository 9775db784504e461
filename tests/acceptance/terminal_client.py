"""A client of a terminal's WebSocket, as anybody would write it with a library of their own choice."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from server_fixture import Server
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

SECONDS = 60.0


class Terminal:
    """What came so far: bytes of the terminal, and JSON about it."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.seen = bytearray()
        self.said: list[dict[str, Any]] = []

    def type(self, text: str | bytes) -> None:
        self.socket.send(text.encode() if isinstance(text, str) else text)

    def tell(self, **order: Any) -> None:
        self.socket.send(json.dumps(order))

    def receive(self, seconds: float) -> bool:
        """One more message; False when none came in time. Raises ConnectionClosed."""
        try:
            message = self.socket.recv(timeout=seconds)
        except TimeoutError:
            return False
        if isinstance(message, bytes):
            self.seen += message
        else:
            self.said.append(json.loads(message))
        return True

    def until(self, text: str, *, after: int = 0) -> int:
        """Wait for a text; where it ends."""
        deadline = time.monotonic() + SECONDS
        while (at := self.seen.find(text.encode(), after)) < 0:
            left = deadline - time.monotonic()
            assert left > 0, bytes(self.seen[-2_000:])
            self.receive(left)
        return at + len(text)

    def end(self) -> tuple[int, str]:
        """Read to the end; the code and the reason of the close."""
        with contextlib.suppress(ConnectionClosed):
            while self.receive(SECONDS):
                pass
        assert self.socket.close_code is not None
        return self.socket.close_code, self.socket.close_reason or ""


def address(server: Server, base: str, name: str, **query: str) -> str:
    """The address of a terminal's WebSocket, with the key in its query unless told otherwise."""
    query = {"api_key": server.token, **query}
    text = "&".join(f"{field}={quote(value, safe='')}" for field, value in query.items() if value)
    return f"ws://127.0.0.1:{server.port}{base}/pty/{name}/connect?{text}"


@contextlib.contextmanager
def terminal(
    server: Server, base: str, name: str, *, headers: dict[str, str] | None = None, **query: str
) -> Iterator[Terminal]:
    """A client that is connected."""
    with connect(
        address(server, base, name, **query), additional_headers=headers, compression=None, proxy=None, max_size=None
    ) as socket:
        yield Terminal(socket)
