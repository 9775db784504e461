"""Guest paths on the guest link: text where they are UTF-8, base64 where they are not."""

from __future__ import annotations

import base64
from typing import Any

from innkeeper.core.host_verbs import path_from_wire, path_to_wire
from innkeeper.errors import InvalidRequestError

PATH_MAX = 4_096


def guest_path(text: str) -> bytes:
    """The bytes of a path from the bus. Raises InvalidRequestError unless it is absolute, without NUL and not too long."""
    try:
        path = path_from_wire(text)
    except ValueError as error:
        raise InvalidRequestError("path: not valid") from error
    if not path.startswith(b"/") or b"\0" in path:
        raise InvalidRequestError("path: must be absolute and without NUL")
    if len(path) > PATH_MAX:
        raise InvalidRequestError(f"path: at most {PATH_MAX} bytes")
    return path


def path_param(path: bytes) -> dict[str, str]:
    """`path` or `path_b64` for a verb of the agent."""
    try:
        return {"path": path.decode()}
    except UnicodeDecodeError:
        return {"path_b64": base64.b64encode(path).decode()}


def guest_path_params(paths: list[bytes]) -> dict[str, Any]:
    """Many paths, as base64, for a verb of the agent."""
    return {"paths_b64": [base64.b64encode(path).decode() for path in paths]}


def name_from_entry(entry: dict[str, Any]) -> str:
    """The name of a directory entry as the bus spells it. Raises ValueError for what an agent must not send."""
    if isinstance(entry.get("name_b64"), str):
        name = base64.b64decode(entry["name_b64"], validate=True)
    elif isinstance(entry.get("name"), str):
        name = entry["name"].encode()
    else:
        raise ValueError("an entry without a name")
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name or len(name) > 255:
        raise ValueError("not a file name")
    return path_to_wire(name)
