"""The verbs of image builds: trees of files in and out of guests, kept steps, finished images."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from innkeeper.bus.contract import End, Handler, ServerCall
from innkeeper.core import build_verbs as verbs
from innkeeper.errors import (
    GuestError,
    ImageNotFoundError,
    InvalidRequestError,
    NotFoundError,
    NotHereError,
    UnavailableError,
)
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.image_export import ExportPlan, export_image
from innkeeper.host.disks.image_store import ImageStore
from innkeeper.host.disks.step_cache import StepCache
from innkeeper.host.files import send_content
from innkeeper.host.fleet import Fleet
from innkeeper.host.linux.mounts import syncfs
from innkeeper.host.verbs import bind_handler
from innkeeper.wire import stream as wire

SOURCES_MAX = 1_000
PATH_BYTES_MAX = 4_096
# What processes that a step left behind get between SIGTERM and SIGKILL; and until the guest has synced its files.
GRACE_MS = 1_000
END_SECONDS = 120.0
EXPORTS_AT_ONCE = 1


class BuildSteps:
    """Serves the verbs of `core.build_verbs`."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        disks: DiskPool,
        images: ImageStore,
        cache: StepCache,
        uid: int,
        gid: int,
        max_image_bytes: int,
    ) -> None:
        self._fleet = fleet
        self._disks = disks
        self._images = images
        self._cache = cache
        self._uid = uid
        self._gid = gid
        self._max_image_bytes = max_image_bytes
        self._scratch: tuple[str, int] | None = None
        # Each keeps a core and the disk busy.
        self._exports = asyncio.Semaphore(EXPORTS_AT_ONCE)

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {
            verbs.PackFiles.verb: bind_handler(verbs.PackFiles, self._pack),
            verbs.UnpackFiles.verb: bind_handler(verbs.UnpackFiles, self._unpack),
            verbs.SaveStep.verb: bind_handler(verbs.SaveStep, self._save),
            verbs.FindSteps.verb: bind_handler(verbs.FindSteps, self._find),
            verbs.ExportStep.verb: bind_handler(verbs.ExportStep, self._export),
            verbs.ScratchImage.verb: bind_handler(verbs.ScratchImage, self._empty),
            verbs.CollectSteps.verb: bind_handler(verbs.CollectSteps, self._collect),
        }

    async def _pack(self, request: verbs.PackFiles, call: ServerCall) -> dict[str, Any]:
        if not 1 <= len(request.sources) <= SOURCES_MAX:
            raise InvalidRequestError(f"sources: 1 to {SOURCES_MAX}")
        for source in request.sources:
            _check_path(source)
        machine = self._fleet.machine(request.instance_id)
        async with machine.in_use():
            stream = await machine.endpoint.open("pack", {"sources": list(request.sources)})
            try:
                sent = 0
                while (event := await stream.next_event()) is not None:
                    if isinstance(event, wire.Message):
                        await call.send_message({"single": event.body.get("single") is True})
                    elif isinstance(event, wire.Data):
                        sent += len(event.data)
                        await call.send_data(event.data)
                answer = await stream.result()
                return {"files": _count(answer, "files"), "bytes": sent}
            finally:
                stream.cancel()

    async def _unpack(self, request: verbs.UnpackFiles, call: ServerCall) -> dict[str, Any]:
        _check_path(request.destination)
        machine = self._fleet.machine(request.instance_id)
        params: dict[str, Any] = {
            "destination": request.destination,
            "as_file": request.as_file,
            "archive": request.archive,
            "owners": request.owners,
        }
        if request.chown is not None:
            params["chown"] = request.chown
        if request.mode is not None:
            params["mode"] = request.mode
        async with machine.in_use():
            answer = await send_content(machine, call, "unpack", params, ended_early="The files ended early")
        return {name: _count(answer, name) for name in ("files", "bytes", "skipped")}

    async def _save(self, request: verbs.SaveStep, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        if machine.upper is None:
            raise NotHereError(f"The host does not read the disks of the driver {machine.driver.name}")
        async with machine.in_use():
            await machine.endpoint.request("end_all", {"grace_ms": GRACE_MS}, timeout_seconds=END_SECONDS)
            disk = self._disks.disk_path(machine.record.disk)
            try:
                # Nothing writes any more. What the kernel still holds back goes to the disk's file; the copy then shares its blocks. Where the host
                # had no room for it, this is the first to hear of it.
                await asyncio.to_thread(syncfs, machine.upper)
                kept = await self._cache.keep(request.key, disk, image_digest=machine.record.shape.image_digest)
            except OSError as error:
                raise UnavailableError(f"The host cannot keep the step: {error.strerror}") from error
        return {"cache_bytes": kept}

    async def _find(self, request: verbs.FindSteps, call: ServerCall) -> dict[str, Any]:
        if not request.hold:
            return {"found": self._cache.found(request.keys)}
        async with self._cache.held(request.keys):
            answer = {"found": self._cache.found(request.keys)}
            await call.send_message(answer)
            async for event in call.events():
                if isinstance(event, End):
                    break
        return answer

    async def _collect(self, request: verbs.CollectSteps, call: ServerCall) -> dict[str, Any]:
        freed = await self._cache.collect(everything=request.everything)
        return {"removed": freed.removed, "freed_bytes": freed.freed_bytes, "cache_bytes": freed.cache_bytes}

    async def _export(self, request: verbs.ExportStep, call: ServerCall) -> dict[str, Any]:
        if request.key is None:
            return await self._hand_over(request.image_digest or "", 0, call)
        kept = self._cache.get(request.key)
        if kept.exported is not None and self._images.size_of(kept.exported[0]) is not None:
            return await self._hand_over(*kept.exported, call)
        async with self._exports:
            with self._cache.copy(request.key) as copy:
                lower = self._images.directory / f"{copy.image_digest}.erofs"
                if not lower.exists():
                    raise NotFoundError("The image below the step is gone")
                return await self._make(ExportPlan(copy.path, lower, self._max_image_bytes), call, key=request.key)

    async def _empty(self, request: verbs.ScratchImage, call: ServerCall) -> dict[str, Any]:
        return await self._make(ExportPlan(None, None, self._max_image_bytes), call, key=None)

    async def _make(self, plan: ExportPlan, call: ServerCall, *, key: str | None) -> dict[str, Any]:
        with self._images.workspace() as work:
            made = await export_image(plan, work, uid=self._uid, gid=self._gid)
            with self._images.held(made.digest):
                await asyncio.to_thread(self._images.publish, made.path, made.digest)
                if key is not None:
                    with contextlib.suppress(NotFoundError):
                        self._cache.note_export(key, made.digest, made.files)
                return await self._hand_over(made.digest, made.files, call)

    async def _hand_over(self, digest: str, files: int, call: ServerCall) -> dict[str, Any]:
        """Say what was made, and keep the file until the opener, who has by then written down that it is wanted, says END."""
        with self._images.held(digest):
            size_bytes = self._images.size_of(digest)
            if size_bytes is None:
                raise ImageNotFoundError
            answer = {"digest": digest, "size_bytes": size_bytes, "files": files}
            await call.send_message(answer)
            async for event in call.events():
                if isinstance(event, End):
                    break
        return answer


def _check_path(path: str) -> None:
    if not path.startswith("/") or "\0" in path or len(path.encode("utf-8", "surrogatepass")) > PATH_BYTES_MAX:
        raise InvalidRequestError(f"path: must be absolute, without NUL, at most {PATH_BYTES_MAX} bytes")


def _count(answer: dict[str, Any], name: str) -> int:
    value = answer.get(name)
    # Not isinstance: JSON's true is an int to Python.
    if type(value) is not int or not 0 <= value < 2**63:
        raise GuestError(f"The guest agent sent no valid {name}")
    return value
