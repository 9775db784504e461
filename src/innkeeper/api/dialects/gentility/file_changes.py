"""How a command's file changes are shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from innkeeper.api.raw_path import encode_path, show_path
from innkeeper.control.executions import FileChange
from innkeeper.core.host_verbs import path_from_wire


def public_url(public_id: UUID, path: bytes) -> str:
    """The relative address of a guest's file that needs no token."""
    return f"/vm/{public_id}/file{encode_path(path)}"


def show_changes(public_id: UUID, rows: Iterable[FileChange]) -> list[dict[str, Any]]:
    """The rows of `files_changed` from a host's."""
    return [_row(public_id, row) for row in rows]


def _row(public_id: UUID, row: FileChange) -> dict[str, Any]:
    path = path_from_wire(row.path)
    deleted = row.status == "deleted"
    return {
        "path": show_path(path),
        "status": row.status,
        "size": 0 if deleted else row.size,
        "mime_type": None if deleted else row.mime_type,
        "public_url": None if deleted else public_url(public_id, path),
    }
