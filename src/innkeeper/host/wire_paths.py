"""Guest paths on the guest link: text where they are UTF-8, base64 where they are not."""

from __future__ import annotations

import base64
from typing import Any

from innkeeper.core.host_verbs import path_from_wire, path_to_wire
from innkeeper.errors import GuestError, InvalidRequestError

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


def absolute_path(entry: dict[str, Any]) -> str:
    """The absolute path that an agent sent, as the bus spells it. Raises GuestError for what it must not send."""
    path = _sent(entry)
    if not path.startswith(b"/") or b"\0" in path or len(path) > PATH_MAX:
        raise GuestError("The guest agent sent no valid path")
    return path_to_wire(path)


def relative_path(entry: dict[str, Any]) -> str:
    """The path below a directory that an agent sent, as the bus spells it; empty for the directory itself. Raises GuestError for what it must not send."""
    path = _sent(entry)
    if (path and any(name in (b"", b".", b"..") for name in path.split(b"/"))) or b"\0" in path or len(path) > PATH_MAX:
        raise GuestError("The guest agent sent no valid path")
    return path_to_wire(path)


def _sent(entry: dict[str, Any]) -> bytes:
    encoded, plain = entry.get("path_b64"), entry.get("path", "")
    try:
        if isinstance(encoded, str):
            return base64.b64decode(encoded, validate=True)
        if isinstance(plain, str):
            return plain.encode()
    except ValueError as error:
        raise GuestError("The guest agent sent no valid path") from error
    raise GuestError("The guest agent sent no valid path")


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


def target_from_entry(entry: dict[str, Any]) -> str | None:
    """Where a symlink points to as the bus spells it, None for what is none. Raises ValueError for what an agent must not send."""
    if isinstance(entry.get("target_b64"), str):
        target = base64.b64decode(entry["target_b64"], validate=True)
    elif isinstance(entry.get("target"), str):
        target = entry["target"].encode()
    else:
        return None
    if not target or b"\0" in target or len(target) > PATH_MAX:
        raise ValueError("not a symlink's target")
    return path_to_wire(target)
