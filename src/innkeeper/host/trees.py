"""Tree verbs: a guest's files found, searched, moved, copied, removed, packed and unpacked by its agent, as its user."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Any

from innkeeper.bus.contract import Data, Handler, ServerCall
from innkeeper.core.tree_verbs import (
    CopyPath,
    FindWorkdir,
    GlobFiles,
    MakeDirectory,
    PackTree,
    RemovePath,
    RenamePath,
    SearchFiles,
    UnpackTree,
    WatchTree,
)
from innkeeper.errors import GuestError
from innkeeper.host.file_watch import watch_tree
from innkeeper.host.files import checked_entry, checked_number, send_content
from innkeeper.host.fleet import Fleet
from innkeeper.host.machine import Machine
from innkeeper.host.verbs import bind_handler
from innkeeper.host.wire_paths import absolute_path, guest_path, path_param, relative_path
from innkeeper.wire.stream import Stream

PAGE_SECONDS = 25.0
SHORT_SECONDS = 10.0
# The agent says every 5 seconds that it still copies or removes; a guest that has no processor time is given some more.
SILENCE_SECONDS = 60.0
# That is passed on no more often than this: it means nothing but that the other end should wait on, and a guest may say it 20,000 times a second.
SIGN_OF_LIFE_SECONDS = 1.0
ROWS_MAX = 1_000
TEXT_CHARACTERS = 512
CURSOR_CHARACTERS = 8_192


class Trees:
    """Translates calls to the agents' verbs."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {
            FindWorkdir.verb: bind_handler(FindWorkdir, self._workdir),
            GlobFiles.verb: bind_handler(GlobFiles, self._glob),
            SearchFiles.verb: bind_handler(SearchFiles, self._search),
            MakeDirectory.verb: bind_handler(MakeDirectory, self._mkdir),
            RenamePath.verb: bind_handler(RenamePath, self._rename),
            CopyPath.verb: bind_handler(CopyPath, self._copy),
            RemovePath.verb: bind_handler(RemovePath, self._remove),
            PackTree.verb: bind_handler(PackTree, self._pack),
            UnpackTree.verb: bind_handler(UnpackTree, self._unpack),
            WatchTree.verb: bind_handler(WatchTree, self._watch),
        }

    async def _workdir(self, request: FindWorkdir, call: ServerCall) -> dict[str, Any]:
        answer = await _ask(self._fleet.machine(request.instance_id), "workdir", {}, SHORT_SECONDS)
        return {"path": absolute_path(answer)}

    async def _glob(self, request: GlobFiles, call: ServerCall) -> dict[str, Any]:
        params = {**_paged(request), "pattern": request.pattern}
        answer = await _ask(self._fleet.machine(request.instance_id), "glob", params, PAGE_SECONDS)
        return {
            "entries": [{"path": relative_path(row), **checked_entry(row)} for row in _rows(answer, "entries")],
            "unreadable": checked_number(answer.get("unreadable")),
            "next_cursor": _cursor(answer),
        }

    async def _search(self, request: SearchFiles, call: ServerCall) -> dict[str, Any]:
        params = {
            **_paged(request),
            "query": request.query,
            "regex": request.regex,
            "ignore_case": request.ignore_case,
            "include": request.include,
        }
        answer = await _ask(self._fleet.machine(request.instance_id), "search", params, PAGE_SECONDS)
        return {
            "matches": [_match(row) for row in _rows(answer, "matches")],
            **{name: checked_number(answer.get(name)) for name in ("binary", "unreadable", "long_lines")},
            "next_cursor": _cursor(answer),
        }

    async def _mkdir(self, request: MakeDirectory, call: ServerCall) -> dict[str, Any]:
        params = {**path_param(guest_path(request.path)), "parents": request.parents}
        await _ask(self._fleet.machine(request.instance_id), "mkdir", params, SHORT_SECONDS)
        return {}

    async def _rename(self, request: RenamePath, call: ServerCall) -> dict[str, Any]:
        params = {**_from_to(request), "replace": request.replace}
        await _ask(self._fleet.machine(request.instance_id), "rename", params, SHORT_SECONDS)
        return {}

    async def _copy(self, request: CopyPath, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        params = {**_from_to(request), "recursive": request.recursive, "replace": request.replace}
        async with machine.transferring():
            answer = await _until_done(machine, "copy", params, call)
        return _tally(answer)

    async def _remove(self, request: RemovePath, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        params = {**path_param(guest_path(request.path)), "recursive": request.recursive}
        async with machine.in_use():
            await _until_done(machine, "remove", params, call)
        return {}

    async def _pack(self, request: PackTree, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        async with machine.transferring():
            stream = await machine.endpoint.open("pack_tree", path_param(guest_path(request.path)))
            try:
                begun = False
                while (event := await stream.next_event()) is not None:
                    if not begun:
                        begun = True
                        await call.send_message({})
                    if isinstance(event, Data):
                        await call.send_data(event.data)
                answer = await stream.result()
            finally:
                stream.cancel()
        return {name: checked_number(answer.get(name)) for name in ("files", "bytes")}

    async def _unpack(self, request: UnpackTree, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        params = path_param(guest_path(request.path))
        async with machine.transferring():
            answer = await send_content(
                machine, call, "unpack_tree", params, ended_early="The archive ended before it was all sent"
            )
        return _tally(answer)

    async def _watch(self, request: WatchTree, call: ServerCall) -> dict[str, Any]:
        return await watch_tree(self._fleet.machine(request.instance_id), request, call)


def _paged(request: GlobFiles | SearchFiles) -> dict[str, Any]:
    limit = max(1, min(request.limit, ROWS_MAX))
    return {**path_param(guest_path(request.path)), "cursor": request.cursor or "", "limit": limit}


def _from_to(request: RenamePath | CopyPath) -> dict[str, Any]:
    to = path_param(guest_path(request.to))
    return {**path_param(guest_path(request.path)), **{name.replace("path", "to"): value for name, value in to.items()}}


async def _ask(machine: Machine, verb: str, params: dict[str, Any], seconds: float) -> dict[str, Any]:
    async with machine.in_use():
        return await machine.endpoint.request(verb, params, timeout_seconds=seconds)


async def _until_done(machine: Machine, verb: str, params: dict[str, Any], call: ServerCall) -> dict[str, Any]:
    stream: Stream = await machine.endpoint.open(verb, params)
    told_at = -math.inf
    try:
        while True:
            async with asyncio.timeout(SILENCE_SECONDS):
                if await stream.next_event() is None:
                    return await stream.result()
            if time.monotonic() - told_at >= SIGN_OF_LIFE_SECONDS:
                told_at = time.monotonic()
                await call.send_message({})
    except TimeoutError:
        raise GuestError(f"The guest fell silent in the middle of a {verb}") from None
    finally:
        stream.cancel()


def _rows(answer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    rows = answer.get(name)
    if not isinstance(rows, list) or len(rows) > ROWS_MAX or not all(isinstance(row, dict) for row in rows):
        raise GuestError("The guest agent sent no valid page")
    return rows


def _match(row: dict[str, Any]) -> dict[str, Any]:
    text = row.get("text")
    if not isinstance(text, str):
        raise GuestError("The guest agent sent no valid page")
    return {
        "path": relative_path(row),
        "line": checked_number(row.get("line")),
        "column": checked_number(row.get("column")),
        "text": text.encode("utf-8", "replace").decode()[:TEXT_CHARACTERS],
        "cut": row.get("cut") is True,
    }


def _cursor(answer: dict[str, Any]) -> str | None:
    following = answer.get("next")
    if following is None:
        return None
    # Cutting it off would end a listing early, and silently.
    if not isinstance(following, str) or len(following) > CURSOR_CHARACTERS:
        raise GuestError("The guest agent sent no valid cursor")
    return following


def _tally(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: checked_number(answer.get(name)) for name in ("files", "bytes", "skipped")}
