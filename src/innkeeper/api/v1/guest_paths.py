"""Paths of a guest in JSON and queries: text; other bytes as `b64:` and base64, so that no name is lost."""

from __future__ import annotations

from innkeeper.core.host_verbs import path_from_wire, path_to_wire
from innkeeper.errors import InvalidRequestError

PATH_BYTES_MAX = 4_095


def path_from_text(name: str, text: str) -> bytes:
    """The path that a field gives. Raises InvalidRequestError naming the field."""
    try:
        path = path_from_wire(text)
    except ValueError:
        raise InvalidRequestError(f"{name}: not a path") from None
    if not path or b"\0" in path or len(path) > PATH_BYTES_MAX:
        raise InvalidRequestError(f"{name}: must have 1 to {PATH_BYTES_MAX} bytes, and no NUL")
    return path


def show_path(path: bytes) -> str:
    """A path as a field gives it."""
    return path_to_wire(path)
