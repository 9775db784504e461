"""Server-sent events: LF frames, a comment while there is nothing to say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from starlette.responses import StreamingResponse

PING = b": ping\n\n"
PING_SECONDS = 10.0
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
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


def answer(frames: AsyncIterator[bytes]) -> StreamingResponse:
    """The answer that is made of these frames."""
    headers = {name.decode(): value.decode() for name, value in HEADERS}
    return StreamingResponse(frames, headers=headers, media_type=None)


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
