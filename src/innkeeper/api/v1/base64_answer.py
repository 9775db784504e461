"""A file as JSON, its content as base64, sent while it is read."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Send

# Base64 is made and sent in pieces, of a multiple of 3 bytes.
PIECE_BYTES = 3 << 16


async def send_base64(send: Send, head: dict[str, Any], chunks: AsyncIterator[bytes], size: int | None) -> None:
    """`{..., "content": "..."}` in pieces. A file that does not have the size that was announced cuts the answer off."""
    left, rest = size, b""
    buffered: list[bytes] = [json.dumps(head, ensure_ascii=False)[:-1].encode("utf-8", "replace"), b', "content": "']
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    async for chunk in chunks:
        piece = chunk if left is None else chunk[:left]
        left = None if left is None else left - len(piece)
        rest += piece
        whole = len(rest) - len(rest) % 3
        if whole >= PIECE_BYTES:
            await send(
                {
                    "type": "http.response.body",
                    "body": b"".join((*buffered, base64.b64encode(rest[:whole]))),
                    "more_body": True,
                }
            )
            buffered, rest = [], rest[whole:]
        if left == 0:
            break
    if left:
        return  # it shrank: no end, so that the client sees that bytes are missing
    body = b"".join((*buffered, base64.b64encode(rest), b'"}'))
    await send({"type": "http.response.body", "body": body, "more_body": False})
