"""The scripted host's answers to the verbs of image builds: what was asked is kept, and steps are kept under their keys."""

from __future__ import annotations

from typing import Any

from innkeeper.bus.contract import Data, End, ServerCall
from innkeeper.core import build_verbs as verbs


class ScriptedBuilds:
    """Steps by key, and the tar streams that guests got."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.exported: list[verbs.ExportStep] = []
        self.unpacked: list[tuple[verbs.UnpackFiles, bytes]] = []

    def answers(self) -> tuple[tuple[type[Any], Any], ...]:
        """Verb and handler."""
        return (
            (verbs.PackFiles, self._pack),
            (verbs.UnpackFiles, self._unpack),
            (verbs.SaveStep, self._save),
            (verbs.FindSteps, self._find),
            (verbs.ExportStep, self._export),
            (verbs.ScratchImage, self._scratch),
            (verbs.CollectSteps, self._collect),
        )

    async def _pack(self, request: verbs.PackFiles, call: ServerCall) -> dict[str, Any]:
        await call.send_message({"single": True})
        await call.send_data(b"packed")
        return {"files": 1, "bytes": 6}

    async def _unpack(self, request: verbs.UnpackFiles, call: ServerCall) -> dict[str, Any]:
        data = b"".join([event.data async for event in call.events() if isinstance(event, Data)])
        self.unpacked.append((request, data))
        return {"files": 1, "bytes": len(data), "skipped": 0}

    async def _save(self, request: verbs.SaveStep, call: ServerCall) -> dict[str, Any]:
        self.kept.append(request.key)
        return {"cache_bytes": 1}

    async def _find(self, request: verbs.FindSteps, call: ServerCall) -> dict[str, Any]:
        answer = {"found": [key for key in request.keys if key in self.kept]}
        if request.hold:
            await call.send_message(answer)
            async for event in call.events():
                if isinstance(event, End):
                    break
        return answer

    async def _export(self, request: verbs.ExportStep, call: ServerCall) -> dict[str, Any]:
        self.exported.append(request)
        return await self._hand_over(request.key or request.image_digest or "", call)

    async def _scratch(self, request: verbs.ScratchImage, call: ServerCall) -> dict[str, Any]:
        return await self._hand_over("5" * 64, call)

    async def _hand_over(self, digest: str, call: ServerCall) -> dict[str, Any]:
        answer = {"digest": digest, "size_bytes": 4096, "files": 3}
        await call.send_message(answer)
        async for event in call.events():
            if isinstance(event, End):
                break
        return answer

    async def _collect(self, request: verbs.CollectSteps, call: ServerCall) -> dict[str, Any]:
        removed = len(self.kept) if request.everything else 0
        self.kept = [] if request.everything else self.kept
        return {"removed": removed, "freed_bytes": 0, "cache_bytes": 0}
