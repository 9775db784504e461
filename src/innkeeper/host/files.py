"""File verbs: every byte goes through the agent in the guest; no guest path is ever opened on the host."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from innkeeper.bus.contract import ServerCall
from innkeeper.core.host_verbs import ListFiles, ReadFile, StatFile, WriteFile
from innkeeper.errors import FileMissingError, ForbiddenError, GuestError, InvalidRequestError, PayloadTooLargeError
from innkeeper.host.file_changes import FileChanges, mime_by_name
from innkeeper.host.guest_link import GuestInputError
from innkeeper.host.machine import Machine
from innkeeper.host.wire_paths import guest_path, name_from_entry, path_param, target_from_entry
from innkeeper.wire.stream import Data, End, Message

STAT_SECONDS = 10.0


async def read_file(machine: Machine, request: ReadFile, call: ServerCall, changes: FileChanges) -> dict[str, Any]:
    """Stream a file; see ReadFile."""
    path = guest_path(request.path)
    if request.public is not None:
        await _check_public(machine, request, path, changes)
    params: dict[str, Any] = {**path_param(path), "offset": request.offset}
    if request.length is not None:
        params["length"] = request.length
    if request.public is not None:
        params["public"] = True
    async with machine.transferring():
        stream = await machine.endpoint.open("read", params)
        try:
            sent = 0
            while (event := await stream.next_event()) is not None:
                if isinstance(event, Message):
                    size = event.body.get("size")
                    if type(size) is not int or not 0 <= size < 2**63:
                        raise GuestError("The guest agent sent no valid size")
                    if request.max_bytes is not None and size > request.max_bytes:
                        raise PayloadTooLargeError(
                            f"The file is larger than {request.max_bytes} bytes; read it with ?raw=1"
                        )
                    await call.send_message(
                        {
                            "size": size,
                            **{
                                name: checked_number(event.body.get(name)) for name in ("mtime_ns", "ctime_ns", "inode")
                            },
                            "mime": _mime(path, event.body),
                        }
                    )
                elif isinstance(event, Data):
                    sent += len(event.data)
                    # The answer's length was announced; a file that grows meanwhile, or an agent that lies, must not exceed a limit.
                    if request.max_bytes is not None and sent > request.max_bytes:
                        raise PayloadTooLargeError
                    await call.send_data(event.data)
            return {"bytes": sent}
        except (GuestInputError, ForbiddenError) as error:
            if request.public is not None:
                raise FileMissingError from error
            raise
        finally:
            stream.cancel()


async def _check_public(machine: Machine, request: ReadFile, path: bytes, changes: FileChanges) -> None:
    instance_id: UUID | None = machine.record.instance_id
    allowed = request.public == "all" or (
        request.public == "reported" and instance_id is not None and await changes.was_reported(instance_id, path)
    )
    if not allowed:
        raise FileMissingError


def _mime(path: bytes, body: dict[str, Any]) -> str:
    sniffed = body.get("mime")
    by_name = mime_by_name(path)
    if by_name is not None:
        return by_name
    if isinstance(sniffed, str) and len(sniffed) <= 127 and sniffed.isascii() and sniffed.isprintable():
        return sniffed
    return "application/octet-stream"


def checked_number(value: object) -> int:
    """A size, a time or a count that an agent sent; 0 where it is none."""
    # Not isinstance: JSON's true is an int to Python.
    return value if type(value) is int and 0 <= value < 2**63 else 0


async def send_content(
    machine: Machine, call: ServerCall, verb: str, params: dict[str, Any], *, ended_early: str
) -> dict[str, Any]:
    """The agent's answer to a verb that takes the call's content. Without END (the client went away) it raises InvalidRequestError with `ended_early`."""
    stream = await machine.endpoint.open(verb, params)
    try:
        ended = False
        async for event in call.events():
            if isinstance(event, Data):
                if stream.over:
                    break
                await stream.send_data(event.data)
            elif isinstance(event, End):
                ended = True
                await stream.send_end()
        if not ended and not stream.over:
            raise InvalidRequestError(ended_early)
        return await stream.result()
    finally:
        stream.cancel()


async def write_file(machine: Machine, request: WriteFile, call: ServerCall) -> dict[str, Any]:
    """Take a file's content from the call; see WriteFile. Without END (the client went away) nothing is written."""
    params: dict[str, Any] = {**path_param(guest_path(request.path)), "parents": True}
    if request.mode is not None:
        params["mode"] = request.mode
    if not request.replace:
        params["replace"] = False
    async with machine.transferring():
        answer = await send_content(machine, call, "write", params, ended_early="The content ended early")
    return {"bytes": checked_number(answer.get("bytes")), "created": bool(answer.get("created"))}


async def stat_file(machine: Machine, request: StatFile) -> dict[str, Any]:
    """See StatFile."""
    async with machine.in_use():
        answer = await machine.endpoint.request(
            "stat",
            {**path_param(guest_path(request.path)), "follow": request.follow},
            timeout_seconds=STAT_SECONDS,
        )
    return {
        **checked_entry(answer),
        **{name: checked_number(answer.get(name)) for name in ("uid", "gid")},
        "target": _target(answer),
    }


def _target(answer: dict[str, Any]) -> str | None:
    try:
        return target_from_entry(answer)
    except ValueError as error:
        raise GuestError("The guest agent sent no valid target") from error


def checked_entry(row: dict[str, Any]) -> dict[str, Any]:
    """Type, size, mode and time of an entry that an agent sent."""
    kind = row.get("type")
    return {
        "type": kind if kind in ("file", "dir", "symlink", "other") else "other",
        **{name: checked_number(row.get(name)) for name in ("size", "mode", "mtime_ns")},
    }


async def list_files(machine: Machine, request: ListFiles) -> dict[str, Any]:
    """See ListFiles."""
    params: dict[str, Any] = {**path_param(guest_path(request.path)), "limit": max(1, min(request.limit, 1_000))}
    if request.cursor is not None:
        params["cursor"] = request.cursor
    async with machine.in_use():
        answer = await machine.endpoint.request("list", params, timeout_seconds=STAT_SECONDS)
    entries = answer.get("entries")
    if not isinstance(entries, list) or len(entries) > 1_000:
        raise GuestError("The guest agent sent no valid listing")
    try:
        rows = [{"name": name_from_entry(entry), **checked_entry(entry)} for entry in entries]
    except (ValueError, TypeError, AttributeError) as error:
        raise GuestError("The guest agent sent no valid listing") from error
    following = answer.get("next")
    return {
        "entries": rows,
        "next_cursor": following if isinstance(following, str) and len(following) <= 4_096 else None,
    }
