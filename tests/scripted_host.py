"""A control side over a real database and a real bus, with a host at the other end that follows a script."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from pydantic import TypeAdapter
from tests.scripted_builds import ScriptedBuilds
from tests.scripted_checkpoints import ScriptedCheckpoints
from tests.scripted_logs import ScriptedLogs
from tests.scripted_ports import ScriptedPorts
from tests.scripted_programs import ScriptedPrograms
from tests.scripted_terminals import ScriptedTerminals
from tests.scripted_trees import ScriptedTrees
from tests.scripted_volumes import ScriptedVolumes

from innkeeper.bus.contract import Data, End, Handler, ServerCall
from innkeeper.bus.in_process import in_process_bus
from innkeeper.control import organizations, tokens
from innkeeper.control.context import Control, build_control
from innkeeper.core import host_verbs as verbs
from innkeeper.core.checkpoint_verbs import SuspendMachine
from innkeeper.core.image import ImageStatus, ShippedImage
from innkeeper.core.instance import Isolation
from innkeeper.core.isolation import Offer
from innkeeper.core.token import Organization, Principal
from innkeeper.errors import (
    ConflictError,
    ExecutionNotFoundError,
    FileMissingError,
    InnkeeperError,
    InstanceNotFoundError,
)
from innkeeper.host.metrics import HostMetrics
from innkeeper.settings import Settings
from innkeeper.store.database import open_database

GVISOR = Isolation("gvisor", "gvisor", "systrap", "measured")
KVM = Isolation("microvm", "qemu", "kvm", "a guest booted", "kvm")
TCG = Isolation("microvm", "qemu", "tcg", "no /dev/kvm", "tcg")
STEPS = ("network_allocated", "ftap_created", "image_generated", "vm_started", "vm_booted", "ready")


class ScriptedHost:
    """The bus peer of the control side: speaks the verbs, validates like the daemon, runs nothing. Tests set what it answers."""

    def __init__(self) -> None:
        self.id = uuid4()
        self.machines: dict[UUID, dict[str, Any]] = {}
        self.request_ids: list[str | None] = []
        self.log_level = "info"
        self.disk_use: list[dict[str, Any]] = []
        self.capacity: dict[str, Any] = {
            "memory_mb": 9_000,
            "memory_reserve_mb": 1_000,
            "memory_overcommit": 1.0,
            "memory_limit_mb": 8_000,
            "memory_committed_mb": 5_000,
            "memory_warm_mb": 1_000,
            "disk_free_mb": 50_000,
            "disk_reserve_mb": 2_048,
            "disk_pool_mb": 60_000,
            "slots": 1_022,
            "slots_used": 9,
            "starts_waiting": 0,
            "executions_waiting": 0,
        }
        self.offers = [Offer("gvisor", GVISOR, GVISOR.reason, frozenset({"freeze", "host_sees_changes"}))]
        self.disks: set[UUID] = set()
        self.files: dict[tuple[UUID, str], bytes] = {}
        self.asked: list[Any] = []
        self.pools: list[verbs.SetPools] = []
        self.images = [
            ShippedImage(
                name, ImageStatus.READY, digest=f"d-{name}", user="user", env={"LANG": "C"}, tools=("python 3.11",)
            )
            for name in ("base", "python-data-science", "node")
        ]
        self.agents: list[dict[str, Any]] = []
        self.ensure_error: InnkeeperError | None = None
        self.destroy_error: InnkeeperError | None = None
        self.suspend_error: InnkeeperError | None = None
        self.hold_suspend = asyncio.Event()
        self.hold_suspend.set()
        # Those whose memory is kept; what becomes of it when they go on.
        self.suspended: set[UUID] = set()
        self.woken: dict[str, Any] = {"with_memory": True, "reason": ""}
        self.read_error: InnkeeperError | None = None
        self.import_error: InnkeeperError | None = None
        self.imported: list[bytes] = []
        self.running_usage: dict[str, dict[str, Any]] = {}
        self.ended_usage: dict[str, dict[str, Any]] = {}
        self.acknowledged = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.hold_collection = asyncio.Event()
        self.hold_collection.set()
        self.hold_execute = asyncio.Event()
        self.hold_execute.set()
        self.output = [b"hello\n"]
        self.result: dict[str, Any] = {}
        # Of executions whose outputs are apart: stderr, what a cell displayed, and what their record says otherwise.
        self.errors = b""
        self.shown = b""
        self.record: dict[str, Any] = {}
        self.execute_error: InnkeeperError | None = None
        self.builds = ScriptedBuilds()
        self.ports = ScriptedPorts(self._there)
        self.programs = ScriptedPrograms(self._there)
        self.terminals = ScriptedTerminals()
        self.trees = ScriptedTrees(self.files, self._there)
        self.checkpoints = ScriptedCheckpoints(self.disks, self.machines, self.suspended, self._ensure)
        self.volumes = ScriptedVolumes(self.machines)
        self.logs = ScriptedLogs()
        self._watchers: set[asyncio.Queue[dict[str, Any]]] = set()

    def count(self, verb: type[Any]) -> int:
        return sum(isinstance(request, verb) for request in self.asked)

    def publish(self, event: dict[str, Any]) -> None:
        for queue in self._watchers:
            queue.put_nowait(event)

    def handlers(self) -> dict[str, Handler]:
        def bind(verb: type[Any], answer: Callable[[Any, ServerCall], Any]) -> Handler:
            adapter = TypeAdapter(verb)

            async def handler(call: ServerCall) -> dict[str, Any]:
                known = {f.name for f in dataclasses.fields(verb)} | {"verb", "request_id"}
                assert call.params.keys() <= known
                request = adapter.validate_python(
                    {k: v for k, v in call.params.items() if k not in ("verb", "request_id")}
                )
                self.asked.append(request)
                self.request_ids.append(call.params.get("request_id"))
                result: dict[str, Any] = await answer(request, call)
                return result

            return handler

        return {
            verb.verb: bind(verb, answer)
            for verb, answer in (
                (verbs.EnsureMachine, self._ensure),
                (verbs.DestroyMachine, self._destroy),
                (SuspendMachine, self._suspend),
                (verbs.ListMachines, self._list),
                (verbs.Execute, self._execute),
                (verbs.ReadOutput, self._read_output),
                (verbs.FollowOutput, self._follow),
                (verbs.ReadResults, self._results),
                (verbs.SignalExecution, self._signal),
                (verbs.ReadFilesChanged, self._files_changed),
                (verbs.ReadFile, self._read_file),
                (verbs.StatFile, self._stat),
                (verbs.WriteFile, self._write_file),
                (verbs.ListFiles, self._list_files),
                (verbs.SetPools, self._set_pools),
                (verbs.ListImages, self._list_images),
                (verbs.CollectImages, self._collect_images),
                (verbs.ImportImage, self._import_image),
                (verbs.HostStatus, self._status),
                (verbs.WatchHost, self._watch),
                (verbs.BackupHost, self._back_up),
                (verbs.Diagnose, self._diagnose),
                (verbs.DiagnoseGuest, self._diagnose_guest),
                (verbs.SetLogLevel, self._set_log_level),
                (verbs.ReadMetrics, self._read_metrics),
                (verbs.CollectGarbage, self._collect_garbage),
                (verbs.DescribeCapacity, self._describe_capacity),
                (verbs.MeasureDisk, self._measure_disk),
                (verbs.ReadUsage, self._read_usage),
                *self.builds.answers(),
                *self.ports.answers(),
                *self.programs.answers(),
                *self.terminals.answers(),
                *self.trees.answers(),
                *self.checkpoints.answers(),
                *self.volumes.answers(),
                *self.logs.answers(),
            )
        }

    async def _read_metrics(self, request: verbs.ReadMetrics, call: ServerCall) -> dict[str, Any]:
        process = {"process": "host"}
        return {
            "families": [
                {
                    "name": "innkeeper_process_threads",
                    "type": "gauge",
                    "help": "Threads of the interpreter.",
                    "samples": [["innkeeper_process_threads", process, 7.0]],
                },
                *HostMetrics().families(),
            ]
        }

    async def _collect_garbage(self, request: verbs.CollectGarbage, call: ServerCall) -> dict[str, Any]:
        return {"items": [{"kind": "disk", "name": "d", "size_bytes": 4096}]}

    async def _measure_disk(self, request: verbs.MeasureDisk, call: ServerCall) -> dict[str, Any]:
        return {"items": self.disk_use}

    async def _describe_capacity(self, request: verbs.DescribeCapacity, call: ServerCall) -> dict[str, Any]:
        return dict(self.capacity)

    async def _read_usage(self, request: verbs.ReadUsage, call: ServerCall) -> dict[str, Any]:
        for machine_id in request.counted:
            self.ended_usage.pop(machine_id, None)
        return {"running": list(self.running_usage.values()), "ended": list(self.ended_usage.values())}

    async def _diagnose(self, request: verbs.Diagnose, call: ServerCall) -> dict[str, Any]:
        return {"tasks": [{"name": request.kind, "count": 1, "stack": []}]}

    async def _diagnose_guest(self, request: verbs.DiagnoseGuest, call: ServerCall) -> dict[str, Any]:
        return {"text": f"goroutine 1 of {request.instance_id}"}

    async def _set_log_level(self, request: verbs.SetLogLevel, call: ServerCall) -> dict[str, Any]:
        self.log_level = request.level or self.log_level
        return {"level": self.log_level}

    async def _ensure(self, request: verbs.EnsureMachine, call: ServerCall) -> dict[str, Any]:
        trace = [{"step": step, "at_ms": float(at)} for at, step in enumerate(STEPS)]
        for step in trace[:3]:
            await call.send_message(step)
        await self.hold.wait()
        if self.ensure_error is not None:
            raise self.ensure_error
        self.machines.setdefault(
            request.instance_id,
            {
                "instance_id": str(request.instance_id),
                "ready": True,
                "frozen": False,
                "idle_seconds": 0.0,
                "user_processes": 0,
                "memory_mb": request.shape.memory_mb,
                "failure": None,
            },
        )
        self.disks.add(request.instance_id)
        (offer,) = (one for one in self.offers if one.driver == request.shape.driver)
        assert offer.isolation is not None
        woken = self.woken if request.instance_id in self.suspended else None
        self.suspended.discard(request.instance_id)
        isolation = dataclasses.asdict(offer.isolation)
        return {"boot_trace": trace, "isolation": isolation, "claimed": True, "woken": woken}

    async def _suspend(self, request: SuspendMachine, call: ServerCall) -> dict[str, Any]:
        await self.hold_suspend.wait()
        if self.suspend_error is not None:
            raise self.suspend_error
        if request.instance_id not in self.suspended:
            self._there(request.instance_id)
            del self.machines[request.instance_id]
            self.suspended.add(request.instance_id)
        return {"memory_bytes": 1}

    async def _destroy(self, request: verbs.DestroyMachine, call: ServerCall) -> dict[str, Any]:
        await self.hold.wait()
        if self.destroy_error is not None:
            raise self.destroy_error
        self.machines.pop(request.instance_id, None)
        self.disks.discard(request.instance_id)
        self.logs.wake(request.instance_id)
        return {}

    async def _list(self, request: verbs.ListMachines, call: ServerCall) -> dict[str, Any]:
        return {"machines": list(self.machines.values()), "disks": [str(disk) for disk in self.disks]}

    def _there(self, instance_id: UUID) -> None:
        if instance_id not in self.machines:
            raise InstanceNotFoundError

    async def _execute(self, request: verbs.Execute, call: ServerCall) -> dict[str, Any]:
        self._there(request.instance_id)
        if self.execute_error is not None:
            raise self.execute_error
        if request.stdin:
            async for event in call.events():
                if isinstance(event, Data):
                    await call.send_data(event.data)
        if request.detach:
            return {}
        await self.hold_execute.wait()
        for piece in self.output:
            await call.send_data(piece)
        if self.errors:
            await call.send_data(self.errors, channel=2)
        return {
            "exit_code": 0,
            "signal": None,
            "timed_out": False,
            "duration_ms": 1.5,
            "started_at": 1.7e9,
            "cpu_ms": 0.5,
            "stderr_bytes": len(self.errors),
            "kernel": None,
            "result_bytes": len(self.shown),
            "results_truncated": False,
            "output_bytes": sum(map(len, self.output)) + len(self.errors),
            "output_truncated": False,
            "files_changed": [{"path": "/tmp/a", "status": "created", "size": 1, "mime_type": "text/plain"}],
            "files_changed_total": 1,
            "files_changed_truncated": False,
            **self.result,
        }

    async def _read_output(self, request: verbs.ReadOutput, call: ServerCall) -> dict[str, Any]:
        self._ran(request.instance_id, request.execution_id)
        whole = b"".join(self.output)
        data = whole[request.offset : request.offset + request.limit]
        await call.send_message({"offset": request.offset, **self._record()})
        await call.send_data(data)
        if self.errors:
            await call.send_data(self.errors, channel=2)
        return {"next_offset": request.offset + len(data)}

    def _record(self) -> dict[str, Any]:
        total = sum(map(len, self.output)) + len(self.errors)
        return {
            "started_at": 1.7e9,
            "total_bytes": total,
            "stderr_bytes": len(self.errors),
            "gap": None,
            "ended": True,
            "exit_code": 0,
            "signal": None,
            "timed_out": False,
            "duration_ms": 1.5,
            "cpu_ms": 0.5,
            "lost": None,
            "kernel": None,
            "result_bytes": len(self.shown),
            "results_truncated": False,
            **self.record,
        }

    async def _follow(self, request: verbs.FollowOutput, call: ServerCall) -> dict[str, Any]:
        self._ran(request.instance_id, request.execution_id)
        at = 0
        for channel, piece in [*((1, one) for one in self.output), (2, self.errors)]:
            if piece and at >= request.offset:
                await call.send_data(piece, channel=channel)
            at += len(piece)
        return self._record()

    async def _results(self, request: verbs.ReadResults, call: ServerCall) -> dict[str, Any]:
        self._ran(request.instance_id, request.execution_id)
        await call.send_data(self.shown)
        return {}

    async def _signal(self, request: verbs.SignalExecution, call: ServerCall) -> dict[str, Any]:
        self._ran(request.instance_id, request.execution_id)
        return {}

    def _ran(self, instance_id: UUID, execution_id: UUID) -> None:
        ran = ((r.instance_id, r.execution_id) for r in self.asked if isinstance(r, verbs.Execute))
        if (instance_id, execution_id) not in ran:
            raise ExecutionNotFoundError

    async def _files_changed(self, request: verbs.ReadFilesChanged, call: ServerCall) -> dict[str, Any]:
        self._ran(request.instance_id, request.execution_id)
        row = {"path": "/tmp/a", "status": "created", "size": 1, "mime_type": None}
        return {"files_changed": [row], "total": 1, "next_cursor": None}

    def _file(self, instance_id: UUID, path: str) -> bytes:
        self._there(instance_id)
        if (instance_id, path) not in self.files:
            raise FileMissingError
        return self.files[instance_id, path]

    async def _read_file(self, request: verbs.ReadFile, call: ServerCall) -> dict[str, Any]:
        if self.read_error is not None:
            raise self.read_error
        data = self._file(request.instance_id, request.path)
        await call.send_message({"size": len(data), "mtime_ns": 1, "ctime_ns": 1, "inode": 1, "mime": "text/plain"})
        end = len(data) if request.length is None else request.offset + request.length
        await call.send_data(data[request.offset : end])
        return {"bytes": len(data[request.offset : end])}

    async def _stat(self, request: verbs.StatFile, call: ServerCall) -> dict[str, Any]:
        size = len(self._file(request.instance_id, request.path))
        return {"type": "file", "size": size, "mode": 0o644, "uid": 1, "gid": 1, "mtime_ns": 1, "target": None}

    async def _write_file(self, request: verbs.WriteFile, call: ServerCall) -> dict[str, Any]:
        self._there(request.instance_id)
        pieces = []
        ended = False
        async for event in call.events():
            if isinstance(event, Data):
                pieces.append(event.data)
            elif isinstance(event, End):
                ended = True
        assert ended
        created = (request.instance_id, request.path) not in self.files
        if not created and not request.replace:
            raise ConflictError("it exists")
        self.files[request.instance_id, request.path] = b"".join(pieces)
        return {"bytes": sum(map(len, pieces)), "created": created}

    async def _list_files(self, request: verbs.ListFiles, call: ServerCall) -> dict[str, Any]:
        self._there(request.instance_id)
        names = sorted(path.rsplit("/", 1)[1] for instance_id, path in self.files if instance_id == request.instance_id)
        rows = [{"name": name, "type": "file", "size": 1, "mode": 0o644, "mtime_ns": 1} for name in names]
        return {"entries": rows, "next_cursor": None}

    async def _set_pools(self, request: verbs.SetPools, call: ServerCall) -> dict[str, Any]:
        self.pools.append(request)
        return {}

    async def _import_image(self, request: verbs.ImportImage, call: ServerCall) -> dict[str, Any]:
        """What a real host says; `imported` keeps the archives that came."""
        await call.send_message({"step": "receiving"})
        content = bytearray()
        events = call.events()
        if request.reference is None:
            async for event in events:
                if not isinstance(event, Data):
                    break
                content += event.data
        self.imported.append(bytes(content))
        await self.hold.wait()
        if self.import_error is not None:
            raise self.import_error
        await call.send_message({"line": "a\x1b[2Jb"})
        config = {"user": "app", "workdir": "/app", "env": {"A": "1"}, "cmd": ["x"]}
        await call.send_message({"made": {"digest": "e" * 64, "size_bytes": 9, "config": config, "known": False}})
        async for event in events:
            if isinstance(event, End):
                self.acknowledged += 1
        return {}

    async def _collect_images(self, request: verbs.CollectImages, call: ServerCall) -> dict[str, Any]:
        await self.hold_collection.wait()
        return {"removed": ["0" * 64], "freed_bytes": 7}

    async def _list_images(self, request: verbs.ListImages, call: ServerCall) -> dict[str, Any]:
        return {
            "images": [dataclasses.asdict(image) for image in self.images],
            "agents": self.agents,
            "agent_version": "1",
        }

    async def _status(self, request: verbs.HostStatus, call: ServerCall) -> dict[str, Any]:
        return {
            "host_id": str(self.id),
            "name": "scripted",
            "drivers": [offer.to_wire() for offer in self.offers],
            "leaked": 0,
        }

    async def _back_up(self, request: verbs.BackupHost, call: ServerCall) -> dict[str, Any]:
        await call.send_message({"staged": [str(disk) for disk in self.disks]})
        kept = self.volumes.kept
        await call.send_message({"staged_volumes": {str(one): row["size_mb"] for one, row in kept.items()}})
        await call.send_message({"estimate_bytes": 1_000})
        await call.send_data(b"\0" * 512)
        return {"manifest_sha256": "0" * 64, "instances": len(self.disks), "volumes": len(kept)}

    async def _watch(self, request: verbs.WatchHost, call: ServerCall) -> dict[str, Any]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            while True:
                await call.send_message(await queue.get())
        finally:
            self._watchers.discard(queue)


class World:
    """One server: its directory, its host, and the control side that runs over them now."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.host = ScriptedHost()
        self.settings = Settings(home=home, room_wait_seconds=60)
        self.control: Control
        self.first_token: str | None = None

    @asynccontextmanager
    async def running(self, **settings: Any) -> AsyncIterator[Control]:
        """The server from start to end; more than one at a time share the database."""
        chosen = self.settings.model_copy(update=settings)
        database = await open_database(f"sqlite:///{self.home}/innkeeper.db")
        try:
            async with in_process_bus(self.host.id, self.host.handlers()) as bus:
                control = build_control(chosen, database, bus)
                first = await organizations.bootstrap(control)
                self.first_token = self.first_token or first
                await control.start()
                try:
                    yield control
                finally:
                    await control.close()
        finally:
            await database.close()

    @property
    def me(self) -> Principal:
        """The first token's principal."""
        assert self.control.default_organization_id is not None
        return Principal(self.control.default_organization_id, uuid4(), tokens.DEFAULT_SCOPES, "token:test")

    @property
    def operator(self) -> Principal:
        return tokens.operator_principal(self.control)

    async def stranger(self) -> Principal:
        """Someone of another organization."""
        organization: Organization = await organizations.create(self.control, self.operator, f"o{uuid4().hex[:8]}")
        return Principal(organization.id, uuid4(), tokens.DEFAULT_SCOPES, "token:stranger")

    def profile_id(self, name: str = "base", *, of: Principal | None = None) -> UUID:
        owner = (of or self.me).organization_id
        return next(
            stored.profile.id
            for stored in self.control.profiles.values()
            if stored.profile.name == name and stored.profile.organization_id == owner
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)
