"""The daemon's handlers: one per verb of `core.host_verbs`. Every request is validated before anything happens."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import structlog
from pydantic import TypeAdapter, ValidationError
from structlog.contextvars import bind_contextvars

from innkeeper.bus.contract import Handler, ServerCall
from innkeeper.bus.link_bus import REQUEST_ID
from innkeeper.core import host_verbs as verbs
from innkeeper.core.image import ShippedImage
from innkeeper.core.instance import BootStep
from innkeeper.errors import InstanceNotFoundError, InvalidRequestError
from innkeeper.host import files, journal
from innkeeper.host.exhaustion import unavailable
from innkeeper.host.file_changes import FileChanges
from innkeeper.host.fleet import Fleet
from innkeeper.host.machine import Machine
from innkeeper.host.request_limits import check_limits

log = structlog.stdlib.get_logger(__name__)

Request = TypeVar("Request")
REPORT_AFTER_MS = 2.0


class Watchers:
    """Events for `host.watch`."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[dict[str, Any]]] = set()

    def publish(self, event: dict[str, Any]) -> None:
        """Tell every watcher. One that lags by thousands of events loses some: it polls `machine.list` as a safety net."""
        for queue in self._queues:
            if queue.qsize() < 10_000:
                queue.put_nowait(event)

    async def watch(self, call: ServerCall) -> dict[str, Any]:
        """Serve `host.watch`."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._queues.add(queue)
        try:
            while True:
                await call.send_message(await queue.get())
        finally:
            self._queues.discard(queue)


def parser(request_type: type[Request]) -> Callable[[ServerCall], Request]:
    """A function that makes the verb's dataclass of a call's parameters. It raises InvalidRequestError, naming fields but no values."""
    adapter = TypeAdapter(request_type)
    fields = {field.name for field in dataclasses.fields(request_type)} | {"verb"}  # type: ignore[arg-type]

    def parse(call: ServerCall) -> Request:
        unknown = call.params.keys() - fields
        if unknown:
            raise InvalidRequestError(f"Unknown fields: {', '.join(sorted(map(str, unknown)))}")
        try:
            request = adapter.validate_python(call.params)
        except ValidationError as error:
            where = ", ".join(
                ".".join(map(str, item["loc"])) + ": " + item["msg"] for item in error.errors(include_input=False)[:5]
            )
            raise InvalidRequestError(where) from None
        check_limits(request)
        return request

    return parse


def bind_handler(
    request_type: type[Request], handle: Callable[[Request, ServerCall], Awaitable[dict[str, Any]]]
) -> Handler:
    """The handler of a verb: it checks the parameters, marks the call's log lines and hands over the verb's dataclass."""
    parse = parser(request_type)

    async def handler(call: ServerCall) -> dict[str, Any]:
        request_id = call.params.pop(REQUEST_ID, None)
        request = parse(call)
        # A call has a task of its own, so what is bound here ends with it.
        marks = {REQUEST_ID: request_id, "instance_id": getattr(request, "instance_id", None)}
        bind_contextvars(**{name: str(value) for name, value in marks.items() if value is not None})
        try:
            return await handle(request, call)
        except OSError as error:
            exhausted = unavailable(error)
            if exhausted is None:
                raise
            log.error("the host has run out of something", verb=call.params.get("verb"), error=str(error))
            raise exhausted from error

    return handler


class Verbs:
    """Translates calls to the fleet and the files."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        changes: FileChanges,
        watchers: Watchers,
        list_images: Callable[[], list[ShippedImage]],
        agents: list[dict[str, Any]],
        collect_images: Callable[[frozenset[str]], Awaitable[dict[str, Any]]],
        status: Callable[[], Awaitable[dict[str, Any]]],
        agent_version: str,
    ) -> None:
        self._fleet = fleet
        self._changes = changes
        self._watchers = watchers
        self._list_images = list_images
        self._agents = agents
        self._collect = collect_images
        self._status = status
        self._agent_version = agent_version

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {
            verbs.EnsureMachine.verb: bind_handler(verbs.EnsureMachine, self._ensure),
            verbs.DestroyMachine.verb: bind_handler(verbs.DestroyMachine, self._destroy),
            verbs.ListMachines.verb: bind_handler(verbs.ListMachines, self._machines),
            verbs.ReadFilesChanged.verb: bind_handler(verbs.ReadFilesChanged, self._files_changed),
            verbs.ReadFile.verb: bind_handler(verbs.ReadFile, self._read_file),
            verbs.StatFile.verb: bind_handler(verbs.StatFile, self._stat_file),
            verbs.WriteFile.verb: bind_handler(verbs.WriteFile, self._write_file),
            verbs.ListFiles.verb: bind_handler(verbs.ListFiles, self._list_files),
            verbs.SetPools.verb: bind_handler(verbs.SetPools, self._set_pools),
            verbs.ListImages.verb: bind_handler(verbs.ListImages, self._images),
            verbs.CollectImages.verb: bind_handler(verbs.CollectImages, self._collect_images),
            verbs.HostStatus.verb: bind_handler(verbs.HostStatus, self._host_status),
            verbs.WatchHost.verb: self._watchers.watch,
        }

    async def _ensure(self, request: verbs.EnsureMachine, call: ServerCall) -> dict[str, Any]:
        steps: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def report() -> None:
            while True:
                await call.send_message(await steps.get())

        reporter: asyncio.Task[None] | None = None

        def on_step(step: BootStep) -> None:
            nonlocal reporter
            steps.put_nowait(asdict(step))
            # A claim is over before anybody could look at its steps, which come with the answer anyway.
            if reporter is None and step.at_ms > REPORT_AFTER_MS:
                reporter = asyncio.get_running_loop().create_task(report())

        try:
            return await self._fleet.ensure(request, on_step)
        finally:
            if reporter is not None:
                reporter.cancel()

    async def _destroy(self, request: verbs.DestroyMachine, call: ServerCall) -> dict[str, Any]:
        await self._fleet.destroy(request.instance_id, keep_disk=request.keep_disk)
        return {}

    async def _machines(self, request: verbs.ListMachines, call: ServerCall) -> dict[str, Any]:
        return {
            "machines": [
                {
                    "instance_id": str(machine.record.instance_id),
                    "ready": machine.record.configured and machine.failure is None,
                    "frozen": machine.frozen,
                    "idle_seconds": round(machine.idle_seconds, 3),
                    "user_processes": machine.user_processes,
                    "memory_mb": machine.record.shape.memory_mb,
                    "failure": machine.failure,
                }
                for machine in self._fleet.machines()
            ],
            "disks": [str(instance_id) for instance_id in self._fleet.disks()],
        }

    async def _files_changed(self, request: verbs.ReadFilesChanged, call: ServerCall) -> dict[str, Any]:
        journal.read_record(self._fleet.journals(request.instance_id), request.execution_id)
        machine: Machine | None
        try:
            machine = self._fleet.machine(request.instance_id)
        except InstanceNotFoundError:
            machine = None
        limit = max(1, min(request.limit, 1_000))
        return await self._changes.page(
            machine, request.instance_id, request.execution_id, cursor=max(0, request.cursor), limit=limit
        )

    async def _read_file(self, request: verbs.ReadFile, call: ServerCall) -> dict[str, Any]:
        return await files.read_file(self._fleet.machine(request.instance_id), request, call, self._changes)

    async def _stat_file(self, request: verbs.StatFile, call: ServerCall) -> dict[str, Any]:
        return await files.stat_file(self._fleet.machine(request.instance_id), request)

    async def _write_file(self, request: verbs.WriteFile, call: ServerCall) -> dict[str, Any]:
        return await files.write_file(self._fleet.machine(request.instance_id), request, call)

    async def _list_files(self, request: verbs.ListFiles, call: ServerCall) -> dict[str, Any]:
        return await files.list_files(self._fleet.machine(request.instance_id), request)

    async def _set_pools(self, request: verbs.SetPools, call: ServerCall) -> dict[str, Any]:
        self._fleet.warm.set(request.pools)
        return {}

    async def _images(self, request: verbs.ListImages, call: ServerCall) -> dict[str, Any]:
        return {
            "images": [asdict(image) for image in self._list_images()],
            "agents": self._agents,
            "agent_version": self._agent_version,
        }

    async def _collect_images(self, request: verbs.CollectImages, call: ServerCall) -> dict[str, Any]:
        return await self._collect(frozenset(request.keep))

    async def _host_status(self, request: verbs.HostStatus, call: ServerCall) -> dict[str, Any]:
        return await self._status()
