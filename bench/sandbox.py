"""The bare agent: a sandbox's agent asked over its own link, with nothing of the server in between."""

from __future__ import annotations

from uuid import uuid4

from innkeeper.host.guest_link import GuestEndpoint
from innkeeper.wire.stream import Message, Stream

EXEC_SECONDS = 30


class Sandbox:
    """A running sandbox, by the host's end of its link."""

    def __init__(self, endpoint: GuestEndpoint) -> None:
        self._endpoint = endpoint

    async def exec(self, command: str) -> float:
        """A shell line by the bare agent over its own link; returns its `duration_us` in milliseconds, counted from the start of the process."""
        params = {"id": uuid4().hex, "shell": command, "merge": True, "timeout_ms": EXEC_SECONDS * 1000}
        stream = await self._endpoint.open("exec", params)
        duration_us: int | None = None
        while (event := await stream.next_event()) is not None:
            if isinstance(event, Message) and event.body.get("exited"):
                if event.body["exit_code"] != 0:
                    raise RuntimeError(f"{command}: exit code {event.body['exit_code']}")
                duration_us = event.body["duration_us"]
        if duration_us is None:
            raise RuntimeError(f"{command}: no end")
        return duration_us / 1000

    async def terminal(self, *argv: str) -> Stream:
        """A program on a terminal by the bare agent: its stream, once it runs. Whoever asks cancels it."""
        params = {"id": uuid4().hex, "argv": list(argv), "pty": {"rows": 24, "cols": 80}}
        stream = await self._endpoint.open("exec", params)
        await stream.next_event()
        return stream

    async def write(self, path: str, piece: bytes, pieces: int) -> int:
        """A file by the bare agent over its own link; returns the bytes."""
        stream = await self._endpoint.open("write", {"path": path})
        for _ in range(pieces):
            await stream.send_data(piece)
        await stream.send_end()
        return int((await stream.result())["bytes"])

    async def read(self, path: str) -> int:
        """The content of a file by the bare agent over its own link; returns the bytes."""
        stream = await self._endpoint.open("read", {"path": path})
        while await stream.next_event() is not None:
            pass
        return int((await stream.result())["bytes"])
