"""The trees of a scripted guest: its files are those of the scripted host."""

from __future__ import annotations

import asyncio
import fnmatch
import json
from collections.abc import Callable, Iterable
from typing import Any
from uuid import UUID

from innkeeper.bus.contract import Data, End, ServerCall
from innkeeper.core import tree_verbs as verbs
from innkeeper.errors import ConflictError, FileMissingError

WORKDIR = "/app"
Files = dict[tuple[UUID, str], bytes]


class ScriptedTrees:
    """Answers to tree verbs. `events` are told by watches as they come; None ends them."""

    def __init__(self, files: Files, there: Callable[[UUID], None]) -> None:
        self._files = files
        self._there = there
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.watching = 0

    def answers(self) -> Iterable[tuple[type[Any], Callable[[Any, ServerCall], Any]]]:
        return (
            (verbs.FindWorkdir, self._workdir),
            (verbs.GlobFiles, self._glob),
            (verbs.SearchFiles, self._search),
            (verbs.MakeDirectory, self._mkdir),
            (verbs.RenamePath, self._rename),
            (verbs.CopyPath, self._copy),
            (verbs.RemovePath, self._remove),
            (verbs.PackTree, self._pack),
            (verbs.UnpackTree, self._unpack),
            (verbs.WatchTree, self._watch),
        )

    def _below(self, request: Any) -> dict[str, bytes]:
        self._there(request.instance_id)
        top = request.path.rstrip("/") + "/"
        return {
            path.removeprefix(top): content
            for (owner, path), content in sorted(self._files.items())
            if owner == request.instance_id and path.startswith(top)
        }

    def _take(self, request: Any) -> bytes:
        self._there(request.instance_id)
        if (request.instance_id, request.path) not in self._files:
            raise FileMissingError
        return self._files[request.instance_id, request.path]

    def _put(self, request: Any, content: bytes) -> None:
        if (request.instance_id, request.to) in self._files and not request.replace:
            raise ConflictError("it exists")
        self._files[request.instance_id, request.to] = content

    async def _workdir(self, request: verbs.FindWorkdir, call: ServerCall) -> dict[str, Any]:
        self._there(request.instance_id)
        return {"path": WORKDIR}

    async def _glob(self, request: verbs.GlobFiles, call: ServerCall) -> dict[str, Any]:
        rows = [
            {"path": path, "type": "file", "size": len(content), "mode": 0o644, "mtime_ns": 1}
            for path, content in self._below(request).items()
            if fnmatch.fnmatch(path, request.pattern)
        ]
        return {"entries": rows, "unreadable": 1, "next_cursor": None if request.cursor else "more"}

    async def _search(self, request: verbs.SearchFiles, call: ServerCall) -> dict[str, Any]:
        rows = [
            {"path": path, "line": number, "column": 1, "text": line, "cut": False}
            for path, content in self._below(request).items()
            for number, line in enumerate(content.decode().splitlines(), 1)
            if request.query in line
        ]
        return {"matches": rows, "binary": 1, "unreadable": 2, "long_lines": 3, "next_cursor": None}

    async def _mkdir(self, request: verbs.MakeDirectory, call: ServerCall) -> dict[str, Any]:
        self._there(request.instance_id)
        return {}

    async def _rename(self, request: verbs.RenamePath, call: ServerCall) -> dict[str, Any]:
        self._put(request, self._take(request))
        del self._files[request.instance_id, request.path]
        return {}

    async def _copy(self, request: verbs.CopyPath, call: ServerCall) -> dict[str, Any]:
        content = self._take(request)
        await call.send_message({})
        self._put(request, content)
        return {"files": 1, "bytes": len(content), "skipped": 0}

    async def _remove(self, request: verbs.RemovePath, call: ServerCall) -> dict[str, Any]:
        self._take(request)
        del self._files[request.instance_id, request.path]
        return {}

    async def _pack(self, request: verbs.PackTree, call: ServerCall) -> dict[str, Any]:
        content = self._take(request)
        await call.send_message({})
        await call.send_data(content)
        return {"files": 1, "bytes": len(content)}

    async def _unpack(self, request: verbs.UnpackTree, call: ServerCall) -> dict[str, Any]:
        self._there(request.instance_id)
        content, ended = b"", False
        async for event in call.events():
            if isinstance(event, Data):
                content += event.data
            ended = ended or isinstance(event, End)
        assert ended
        self._files[request.instance_id, f"{request.path}/archive"] = content
        return {"files": 1, "bytes": len(content), "skipped": 0}

    async def _watch(self, request: verbs.WatchTree, call: ServerCall) -> dict[str, Any]:
        self._there(request.instance_id)
        await call.send_message({"directories": 1})
        self.watching += 1
        try:
            while (event := await self.events.get()) is not None:
                await call.send_data(json.dumps(event).encode() + b"\n")
        finally:
            self.watching -= 1
        return {}
