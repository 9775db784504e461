"""Files of a guest as the server's endpoints have them: those of rooms and those of VMs, in one form."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote_to_bytes

from innkeeper.cli.connection import Server, encode_segment

Place = tuple[str, dict[str, str]]
"""The path of an endpoint and its query."""


@dataclass(frozen=True, slots=True)
class RoomPlace:
    """PROFILE/ROOM:/path."""

    profile: str
    room: str
    path: bytes

    def files(self, server: Server) -> GuestFiles:
        """Where its files are asked for."""
        return RoomFiles(server.room_path(self.profile, self.room))


@dataclass(frozen=True, slots=True)
class VmPlace:
    """VM:path."""

    vm_id: str
    path: bytes

    def files(self, server: Server) -> GuestFiles:
        """Where its files are asked for."""
        return VmFiles(f"/v1/vms/{encode_segment(self.vm_id)}/files")


@dataclass(frozen=True, slots=True)
class Entry:
    """A name of a directory; everything in it is the guest's word."""

    name: bytes
    path: bytes
    type: str
    size: int | None
    mode: int
    modified_at: str


class GuestFiles(Protocol):
    """Where the files of a guest are asked for."""

    def content(self, path: bytes) -> Place:
        """GET reads the file, PUT writes it."""
        ...

    def listing(self, path: bytes) -> Place:
        """GET lists the directory."""
        ...

    def entry(self, row: dict[str, Any]) -> Entry:
        """One row of a listing."""
        ...


class RoomFiles:
    """Of a room."""

    def __init__(self, room: str) -> None:
        self._room = room

    def content(self, path: bytes) -> Place:
        """See GuestFiles."""
        return f"{self._room}/file{quote(path, safe='/')}", {"raw": "1"}

    def listing(self, path: bytes) -> Place:
        """See GuestFiles."""
        return f"{self._room}/files{quote(path, safe='/')}", {}

    def entry(self, row: dict[str, Any]) -> Entry:
        """See GuestFiles."""
        path = row["path"]
        name = unquote_to_bytes(path.rpartition("/")[2])
        return Entry(
            name, unquote_to_bytes(path), row["type"], row.get("size"), int(row["mode"], 8), row["modified_at"]
        )


class VmFiles:
    """Of a VM."""

    def __init__(self, files: str) -> None:
        self._files = files

    def content(self, path: bytes) -> Place:
        """See GuestFiles."""
        return f"{self._files}/content", {"path": spelled(path)}

    def listing(self, path: bytes) -> Place:
        """See GuestFiles."""
        return self._files, {"path": spelled(path)}

    def entry(self, row: dict[str, Any]) -> Entry:
        """See GuestFiles."""
        name, path = unspelled(row["name"]), unspelled(row["path"])
        return Entry(name, path, row["type"], row["size"], int(row["mode"], 8), row["modified_at"])


def spelled(path: bytes) -> str:
    """A path as the endpoints of VMs' and volumes' files take it."""
    try:
        text = path.decode()
    except UnicodeDecodeError:
        text = "b64:"
    return "b64:" + base64.b64encode(path).decode() if text.startswith("b64:") else text


def unspelled(text: str) -> bytes:
    """A path as those endpoints tell it."""
    return base64.b64decode(text[4:]) if text.startswith("b64:") else text.encode("utf-8", "surrogatepass")


def entries(server: Server, files: GuestFiles, path: bytes) -> Iterator[Entry]:
    """All names of a directory. A guest that answers listings without end is read without end: names come as they are asked for."""
    url, query = files.listing(path)
    cursor: str | None = None
    seen: set[str] = set()
    while True:
        page = server.call("GET", url, query={**query, "cursor": cursor})
        for row in page["entries"]:
            yield files.entry(row)
        cursor = page["next_cursor"]
        if cursor is None or cursor in seen:
            return
        seen.add(cursor)


def parse_place(text: str) -> RoomPlace | VmPlace | Path:
    """`PROFILE/ROOM:/path` or `vm_...:path`, anything else as a local path; `./`, `../` and `/` in front always mean local."""
    vm_id, colon, path = text.partition(":")
    if vm_id.startswith("vm_") and "/" not in vm_id and colon:
        return VmPlace(vm_id, os.fsencode(path) or b".")
    profile, slash, rest = text.partition("/")
    room, colon, path = rest.partition(":/")
    if not (slash and colon and profile and room) or profile in (".", ".."):
        return Path(text)
    return RoomPlace(profile, room, b"/" + os.fsencode(path))
