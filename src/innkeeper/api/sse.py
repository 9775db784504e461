"""Server-sent events: LF frames, a comment while there is nothing to say."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

PING = b": ping\n\n"
PING_SECONDS = 10.0
MEDIA_TYPE = b"text/event-stream"
HEADERS = [
    (b"content-type", MEDIA_TYPE + b"; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # nginx would hold the stream back otherwise.
    (b"x-accel-buffering", b"no"),
]
# One event, as the OpenAPI document describes a stream: what a client's parser hands on. Comments are no events.
CONTENT: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON"}},
            "required": ["event", "data"],
        }
    }
}


class EventStream(StreamingResponse):
    """An answer made of frames. Their generator is closed with it, also where the client went away while a frame was being sent."""

    def __init__(self, frames: AsyncGenerator[bytes, None]) -> None:
        headers = {name.decode(): value.decode() for name, value in HEADERS}
        super().__init__(frames, headers=headers, media_type=None)
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with aclosing(self._frames):
            await super().__call__(scope, receive, send)


async def log_frames(events: AsyncGenerator[dict[str, Any] | None, None]) -> AsyncGenerator[bytes, None]:
    """The frames of a log of ours, whose entries name their event; None is a silence."""
    async with aclosing(events):
        async for entry in events:
            yield PING if entry is None else frame(entry["event"], {k: v for k, v in entry.items() if k != "event"})


def frame(event: str, data: dict[str, Any], *, event_id: int | str | None = None) -> bytes:
    """One event, after which a client that comes again names `event_id`. JSON has no raw newline, so one data line is enough."""
    begin = f"event: {event}\n" if event_id is None else f"id: {event_id}\nevent: {event}\n"
    return f"{begin}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def wants_events(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the Accept header names text/event-stream with a quality above 0."""
    for name, value in headers:
        if name != b"accept" or b"event-stream" not in value.lower():
            continue
        for item in value.decode("latin-1").lower().split(","):
            media_type, *parameters = (part.strip() for part in item.split(";"))
            if media_type == "text/event-stream":
                return not any(p.replace(" ", "") in ("q=0", "q=0.0", "q=0.00", "q=0.000") for p in parameters)
    return False
