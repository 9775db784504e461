"""A server for the command line's tests: real HTTP over a real unix socket, answers validated by the API's own models, a guest's files in a dict."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID, uuid4

import uvicorn
from pydantic import BaseModel

from innkeeper.api import sse
from innkeeper.api.dialects.gentility import schemas
from innkeeper.api.dialects.gentility.room_path import parse_room_path
from innkeeper.api.raw_path import encode_path, guest_path, show_path
from innkeeper.api.v1 import account_schemas, execution_schemas, log_schemas, retention_schemas, vm_schemas
from innkeeper.api.v1 import schemas as v1
from innkeeper.api.v1.operator_schemas import DiskAnswer, DiskItem
from innkeeper.api.v1.snapshot_schemas import SnapshotAnswer
from innkeeper.api.v1.volume_file_schemas import VolumeFile, VolumeFileDeleted, VolumeFileUploaded
from innkeeper.api.v1.volume_schemas import CheckpointAnswer, VmVolumeAnswer, VolumeAnswer, VolumeUser

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
INSTANCE = UUID("11111111-1111-4111-8111-111111111111")
VM = "vm_" + "a" * 26
EXECUTION = "33333333-3333-4333-8333-333333333333"
HOST = UUID("22222222-2222-4222-8222-222222222222")


def profile(name: str = "base", **fields: Any) -> schemas.ProfileAnswer:
    values: dict[str, Any] = {
        "id": uuid4(), "name": name, "image": "base", "vcpu_count": 2, "memory_mb": 1024, "disk_mb": 10_240, "env": ["A"],
        "user": None, "workdir": None, "egress_policy": {"mode": "internet"}, "driver": "auto", "min_isolation": "gvisor",
        "warm_pool_size": 2, "idle_seconds": 86_400, "command_timeout_seconds": 120, "public_files": "reported", "created_at": NOW,
    }  # fmt: skip
    return schemas.ProfileAnswer(**{**values, **fields})


def vm(**fields: Any) -> vm_schemas.VmRecord:
    values: dict[str, Any] = {
        "vm_id": VM, "session_id": str(INSTANCE), "status": "active", "created_at": NOW, "expires_at": NOW, "last_active_at": NOW,
        "ended_at": None, "end_reason": None, "error": None, "vm_lifetime_seconds": 300, "memory_mb": 512, "next_memory_mb": 1024,
        "vcpu_count": 2, "disk_mb": 10_240, "metadata": {"team": "a\x1b"}, "image": "base", "image_variant": None, "image_digest": "d",
        "idle_seconds": None, "egress_policy": None, "hold_until": None, "hold_reason": None, "env_status": "none", "env_error": None,
        "isolation": None, "boot_trace": [], "host": None, "driver": "auto", "min_isolation": "gvisor", "ssh_host": None,
        "snapshot_id": None, "restored": None, "snapshot_on_terminate": False, "snapshot_name": None,
        "auto_suspend": False, "auto_resume": True, "suspend_reason": None, "woken_by": None,
    }  # fmt: skip
    return vm_schemas.VmRecord(**{**values, **fields})


def ssh_key(number: int, **fields: Any) -> account_schemas.SshKeyAnswer:
    values = {"id": number, "fingerprint": f"SHA256:{number}", "comment": "mine", "public_key": "k", "created_at": NOW}
    return account_schemas.SshKeyAnswer(**{**values, **fields})


def volume(**fields: Any) -> VolumeAnswer:
    user = VolumeUser(vm_id=VM, mount_path="/da\x1bta", mode="rw", checkpoint_id=None)
    values: dict[str, Any] = {
        "id": str(INSTANCE), "volume_id": str(INSTANCE), "name": "na\x1b[2Jme", "quota_bytes": 100, "used_bytes": 7, "own_bytes": 5,
        "status": "ready", "created_at": NOW,
        "guest_written": False, "mounts": [user], "error": None,
    }  # fmt: skip
    return VolumeAnswer(**{**values, **fields})


def _of_retention(path: str, body: bytes) -> Any:
    if path.endswith("/apply"):
        asked = retention_schemas.Apply.model_validate_json(body)
        one = retention_schemas.ExcessItem(
            kind="snapshots", id=str(INSTANCE), of=VM, name="na\x1b[2Jme", created_at=NOW, size_bytes=2048, reason="keep_last", stays=None
        )  # fmt: skip
        return retention_schemas.Applied(items=[one], removed=asked.remove, total_bytes=2048)
    return retention_schemas.Policy.model_validate_json(body or b'{"snapshots": {"keep_last": 3}}')


def _of_volumes(method: str, path: str) -> Any:
    if path.startswith("/v1/vms/"):
        return VmVolumeAnswer(
            volume_id=str(INSTANCE), mount_path="/data", mode="ro", checkpoint_id=None, status="attached"
        )
    if "/checkpoints" in path:
        fields = volume().model_dump(exclude={"guest_written"})
        kept = CheckpointAnswer(**{**fields, "checkpoint_id": str(INSTANCE)})
        return [kept] if method == "GET" else kept
    return [volume()] if (method, path) == ("GET", "/v1/volumes") else volume()


def snapshot(**fields: Any) -> SnapshotAnswer:
    values: dict[str, Any] = {
        "id": str(INSTANCE), "snapshot_id": str(INSTANCE), "name": "na\x1b[2Jme", "type": "user", "status": "ready", "created_at": NOW, "vm_id": VM,
        "memory": True, "downtime_ms": 180.5, "size_bytes": 30, "disk_bytes": 20, "memory_bytes": 10, "own_bytes": 12, "shared_bytes": 18,
        "vcpu_count": 2, "memory_mb": 512, "disk_mb": 10_240, "driver": "gvisor", "image": "base", "image_digest": "d", "parent_id": None,
        "children": ["c"], "volumes": [], "is_public": False, "oci_image": None, "last_error": None, "error": None,
        "damaged": False, "disk_digest": None, "verified_at": None, "checks": [],
    }  # fmt: skip
    return SnapshotAnswer(**{**values, **fields})


@dataclass
class Seen:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class ScriptedServer:
    """Change its fields before a request; `seen` has what arrived."""

    socket: Path
    profiles: list[schemas.ProfileAnswer] = field(default_factory=lambda: [profile()])
    organizations: list[v1.OrganizationAnswer] = field(default_factory=list)
    tokens: list[v1.TokenAnswer] = field(default_factory=list)
    rooms: list[v1.RoomDetail] = field(default_factory=list)
    files: dict[bytes, bytes | str] = field(default_factory=dict)
    """Guest path -> content; a str is the type of something that is no file."""
    ssh_keys: list[account_schemas.SshKeyAnswer] = field(default_factory=list)
    snapshot: dict[str, Any] = field(default_factory=dict)
    """What is otherwise of every snapshot."""
    snapshot_end: dict[str, Any] = field(default_factory=lambda: {"status": "ready", "error": None, "digest": "d" * 64})
    output: list[str] = field(default_factory=list)
    exit_code: int = 0
    errors: list[str] = field(default_factory=list)
    """What an execution writes to its second output, after the first one's."""
    ends_after_signals: int = 0
    lost: str | None = None
    timed_out: bool = False
    kernel: dict[str, bool] | None = None
    changes: list[schemas.FileChange] = field(default_factory=list)
    changes_total: int | None = None
    error_event: tuple[str, str] | None = None
    cut: bool = False
    error: tuple[int, dict[str, str]] | None = None
    page_size: int = 2
    seen: list[Seen] = field(default_factory=list)
    name_override: str | None = None
    log_streams: list[Any] = field(default_factory=list)
    """What one stream of a log after the other says: rows, `gap`, `error` and `end`, after which it ends; or a status. The rows of the first are its page."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        raw = scope["raw_path"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        query = parse_qs(scope["query_string"].decode())
        self.seen.append(Seen(scope["method"], raw.decode(), query, headers, body))
        if self.error is not None:
            await _answer(send, self.error[0], self.error[1])
            return
        room = parse_room_path(raw)
        if raw.endswith((b"/logs", b"/logs/stream")):
            await self._log(raw.decode(), send)
        elif room is not None and room.room:
            await self._room(room, scope["method"], query, headers, body, send)
        elif raw.endswith(b"/exec") or raw == b"/execute_async" or raw.startswith(b"/v1/executions/"):
            await self._execution(raw.decode(), headers, body, send)
        else:
            await self._other(scope["method"], raw.decode(), query, body, send)

    async def _volume_files(self, method: str, path: str, query: Any, body: bytes, send: Any) -> None:
        name = query.get("path", [""])[0]
        key = b"/volume/" + name.encode()
        if method == "PUT":
            self.files[key] = body
            done = VolumeFileUploaded(status="success", path=name, size=len(body), created=True)
            await _answer(send, 200, done)
        elif method == "DELETE":
            await _answer(send, 200, VolumeFileDeleted(status="deleted", path=name))
        elif not path.endswith("/content"):
            row = VolumeFile(path="a\x1bb/c", name="c", type="file", size=3, mode="0644", modified_at=NOW)
            await _answer(send, 200, [row])
        elif isinstance(content := self.files.get(key), bytes):
            await _start(send, 200, [(b"content-length", str(len(content)).encode())])
            await send(
                {"type": "http.response.body", "body": content[:3] if self.cut else content, "more_body": self.cut}
            )
        else:
            await _answer(send, 404, v1.error_shape("file_not_found", "There is no such file"))

    async def _other(self, method: str, path: str, query: Any, body: bytes, send: Any) -> None:
        lists: dict[str, Any] = {
            "/api/profiles": self.profiles,
            "/v1/organizations": self.organizations,
            "/v1/tokens": self.tokens,
            "/v1/rooms": [v1.RoomRow(**room.model_dump(exclude={"boot_trace"})) for room in self.rooms],
            "/v1/images": [
                v1.ImageAnswer(
                    id=uuid4(), name="base", source="shipped", source_ref="base", status="ready", digest="0123456789abcdef0123",
                    size_bytes=12_345_678, user="user", workdir="/home/user", env={}, entrypoint=[], cmd=[], exposed_ports=[],
                    labels={}, tools=["git"], created_at=NOW, updated_at=NOW, last_error="a\x1b[2Jb",
                )
            ],
            "/v1/hosts": [
                v1.HostAnswer(
                    id=HOST, name="here", draining=False, reachable=True, driver="gvisor", platform="ptrace", memory_mb=8000,
                    memory_committed_mb=1024, machines=3, frozen=2, disk_free_mb=9, leaked=0,
                    pools=[v1.PoolAnswer(pool_key="k", size=2, ready=1)],
                    drivers=[
                        v1.DriverAnswer(
                            driver="gvisor", reason="faster here", capabilities=["freeze"],
                            isolation=v1.IsolationAnswer(level="gvisor", driver="gvisor", platform="ptrace", reason="faster here"),
                        ),
                        v1.DriverAnswer(driver="qemu", isolation=None, reason="QEMU is not installed", capabilities=[]),
                    ],
                ),
                v1.HostAnswer(id=uuid4(), name="gone", draining=False, reachable=False),
            ],
            "/v1/ssh-keys": account_schemas.SshKeyList(keys=self.ssh_keys),
            "/v1/audit": v1.AuditPage(
                events=[
                    v1.AuditEventAnswer(
                        id=uuid4(), at=NOW, actor="token:ci", action="room.create", object_type="room", object_id="r", details={"k": "v"}
                    )
                ],
                next_cursor=None,
            ),
        }  # fmt: skip
        if path == f"/v1/hosts/{HOST}/disk":
            item = DiskItem(organization="a\x1bb", kind="disk", count=2, size_bytes=4 << 20, own_bytes=1 << 20)
            own = DiskItem(organization=None, kind="database", count=1, size_bytes=1 << 20, own_bytes=1 << 20)
            await _answer(send, 200, DiskAnswer(items=[item, own], total_bytes=2 << 20))
            return
        if path.startswith("/v1/retention"):
            await _answer(send, 200, _of_retention(path, body))
            return
        if path.startswith("/v1/volumes/") and "/files" in path:
            await self._volume_files(method, path, query, body, send)
            return
        if "/volumes" in path:
            await _answer(send, 200, _of_volumes(method, path))
            return
        if path.endswith("/snapshot") or path.startswith("/v1/snapshots"):
            await self._snapshots(method, path, send)
            return
        if path.startswith("/v1/vms"):
            await self._vms(method, path, body, send)
        elif method == "GET" and path in lists:
            await _answer(send, 200, lists[path])
        elif method == "GET" and path.startswith("/v1/rooms/"):
            await _answer(
                send, 200, next(room for room in self.rooms if str(room.instance_id) == path.rsplit("/", 1)[1])
            )
        elif method == "POST" and path == "/v1/organizations":
            made = v1.OrganizationCreate.model_validate_json(body)
            await _answer(send, 201, organization(**made.model_dump()))
        elif method == "PATCH" and path.startswith("/v1/organizations/"):
            limits = v1.OrganizationLimits.model_validate_json(body)
            await _answer(send, 200, organization(path.rsplit("/", 1)[1], **limits.model_dump()))
        elif method == "POST" and path == "/v1/tokens":
            request = v1.TokenCreate.model_validate_json(body)
            await _answer(send, 201, v1.TokenCreated(**token(request.name).model_dump(), token="rk_live_" + "0" * 32))
        elif method == "POST" and path == "/v1/ssh-keys":
            added = account_schemas.SshKeyCreate.model_validate_json(body)
            self.ssh_keys.append(ssh_key(len(self.ssh_keys) + 1, public_key=added.public_key))
            await _answer(send, 200, self.ssh_keys[-1])
        elif method == "POST" and path == "/api/profiles":
            create = schemas.ProfileCreate.model_validate_json(body)
            await _answer(send, 201, profile(create.name, image=create.image))
        elif method == "PATCH" and path.startswith("/api/profile/"):
            schemas.ProfileUpdate.model_validate_json(body)
            await _answer(send, 200, self.profiles[0])
        elif method == "GET" and path.startswith("/api/profile/"):
            await _answer(send, 200, next(one for one in self.profiles if str(one.id) == path.rsplit("/", 1)[1]))
        elif method == "DELETE":
            await _answer(send, 204, None)
        else:
            await _answer(send, 404, schemas.error_shape("not_found", "There is no such endpoint."))

    async def _log(self, path: str, send: Any) -> None:
        if path.endswith("/logs"):
            rows = [row for row in self.log_streams[0] if isinstance(row, dict)]
            await _answer(send, 200, log_schemas.LogAnswer(lines=rows, first=1, last=len(rows)))
            return
        told = self.log_streams.pop(0)
        if isinstance(told, int):
            await _answer(send, told, v1.error_shape("no", "No."))
            return
        frames = b": ping\n\n"
        for one in told:
            if one == "gap":
                frames += sse.frame("gap", {"first": 4, "last": 7}, event_id=7)
            elif isinstance(one, str):
                frames += sse.frame(one, v1.error_shape("gone", "Gone.") if one == "error" else {})
            else:
                frames += sse.frame("log", one, event_id=one["sequence"])
        await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
        await send({"type": "http.response.body", "body": frames})

    async def _vms(self, method: str, path: str, body: bytes, send: Any) -> None:
        if method == "GET" and path.rstrip("/") == "/v1/vms":
            await _answer(
                send,
                200,
                [vm()] if path.endswith("s") else [vm(), vm(status="killed", end_reason="idle", ended_at=NOW)],
            )
        elif path == "/v1/vms":
            vm_schemas.VMCreateRequest.model_validate_json(body)
            await _answer(send, 200, vm_schemas.VMCreateResponse(vm_id=VM, session_id=str(INSTANCE), status="active"))
        elif path == f"/v1/vms/{VM}/events":
            event = vm_schemas.VmEventAnswer(id="e", at=NOW, type="ready", reason="star\x1b[2Jted", details={})
            await _answer(send, 200, [event])
        elif path == f"/v1/vms/{VM}/clone":
            clone = vm_schemas.VmClonedAnswer(
                vm_id=f"{VM}-2", session_id="s", status="active", snapshot_id=None, volumes=[]
            )
            await _answer(send, 200, clone)
        elif path == f"/v1/vms/{VM}/fork":
            one = vm_schemas.VmForkedAnswer(vm_id=f"{VM}-2", session_id="s", status="active", error=None)
            none = vm_schemas.VmForkedAnswer(vm_id=None, session_id=None, status="error", error="a\x1bb")
            await _answer(send, 200, vm_schemas.VmForksAnswer(vms=[one, none], snapshot_id=None, volumes=[]))
        elif path == f"/v1/vms/{VM}/suspend":
            await _answer(send, 200, vm(status="suspended", suspend_reason="asked"))
        elif path == f"/v1/vms/{VM}/resume":
            await _answer(send, 200, vm(vm_id=f"{VM}-2", status="creating"))
        elif path == f"/v1/vms/{VM}/hold":
            vm_schemas.VmHold.model_validate_json(body)
            await _answer(send, 200, vm())
        elif path == f"/v1/vms/{VM}":
            if method == "PATCH":
                vm_schemas.VmUpdate.model_validate_json(body)
            await _answer(send, 200, vm())
        else:
            await _answer(send, 404, v1.error_shape("vm_not_found", "VM not found."))

    async def _room(self, room: Any, method: str, query: Any, headers: Any, body: bytes, send: Any) -> None:
        path = guest_path(room.rest)
        route = room.route.partition("{room_id}")[2]
        if route == "/command":
            await self._command(room, schemas.CommandRequest.model_validate_json(body), headers, send)
        elif route == "" and method == "DELETE":
            await _answer(send, 204, None)
        elif route == "":
            schemas.RoomRequest.model_validate_json(body or b"{}")
            named = schemas.Named(id=self.profiles[0].id, name=self.profiles[0].name)
            answer = schemas.RoomAnswer(
                instance_id=INSTANCE, profile_id=named.id, room_id=room.room_id(), status="ready", profile=named
            )
            await _answer(send, 200, answer)
        elif route.startswith("/files/"):
            await self._listing(path, query, send)
        elif method == "PUT":
            created = path not in self.files
            self.files[path] = body
            written = schemas.FileWritten(
                file_path=show_path(path), instance_id=INSTANCE, size=len(body), created=created
            )
            await _answer(send, 201 if created else 200, written)
        elif isinstance(content := self.files.get(path), bytes):
            assert query["raw"] == ["1"]
            await _start(send, 200, [(b"content-length", str(len(content)).encode())])
            if self.cut:
                await send({"type": "http.response.body", "body": content[:3], "more_body": True})
                return
            await send({"type": "http.response.body", "body": content})
        elif path in self.files or self._is_directory(path):
            await _answer(send, 400, schemas.error_shape("invalid_request", "not a regular file"))
        else:
            await _answer(send, 404, schemas.error_shape("file_not_found", f"File '{show_path(path)}' not found"))

    def _is_directory(self, path: bytes) -> bool:
        return any(known.startswith(path.rstrip(b"/") + b"/") for known in self.files)

    async def _listing(self, path: bytes, query: Any, send: Any) -> None:
        if not self._is_directory(path):
            status, code = (400, "invalid_request") if path in self.files else (404, "file_not_found")
            await _answer(send, status, schemas.error_shape(code, f"'{show_path(path)}' is not a directory"))
            return
        top = path.rstrip(b"/") + b"/"
        names = sorted({known[len(top) :].split(b"/")[0] for known in self.files if known.startswith(top)})
        start = int(query.get("cursor", ["0"])[0])
        entries = [self._entry(top, name) for name in names[start : start + self.page_size]]
        after = start + self.page_size
        listing = schemas.DirectoryListing(
            file_path=show_path(path), instance_id=INSTANCE, entries=entries, next_cursor=str(after) if after < len(names) else None
        )  # fmt: skip
        await _answer(send, 200, listing)

    def _entry(self, top: bytes, name: bytes) -> schemas.DirectoryEntry:
        content = self.files.get(top + name)
        kind = "dir" if content is None else "file" if isinstance(content, bytes) else content
        size = len(content) if isinstance(content, bytes) else 0
        encoded = self.name_override if self.name_override is not None else encode_path(top + name)
        return schemas.DirectoryEntry(
            name=show_path(name), path=encoded, type=kind, size=size, mode="4755", modified_at=NOW
        )  # type: ignore[arg-type]

    async def _execution(self, path: str, headers: Any, body: bytes, send: Any) -> None:
        known: dict[str, Any] = {
            "execution_id": EXECUTION, "vm_id": VM, "session_id": str(INSTANCE), "created_at": NOW,
            "exit_code": None if self.lost else self.exit_code,
        }  # fmt: skip
        started = execution_schemas.TaskStarted(task_id=EXECUTION, status="running", **known)
        if path == "/execute_async":
            execution_schemas.ExecuteRequest.model_validate_json(body)
            await _answer(send, 200, started)
        elif path.endswith("/exec") and execution_schemas.ExecRequest.model_validate_json(body).background:
            await _answer(send, 202, started)
        elif path.endswith("/exec"):
            out, err = "".join(self.output), "".join(self.errors)
            answer = execution_schemas.Executed(
                stdout=out, stderr=err, output=out, files_changed=[], files_changed_total=0, files_changed_truncated=False, **known
            )  # fmt: skip
            await _answer(send, 200, answer)
        elif path == f"/v1/executions/{EXECUTION}/signal":
            execution_schemas.SignalRequest.model_validate_json(body)
            await _answer(send, 200, execution_schemas.Signalled(status="ok"))
        else:
            assert path == f"/v1/executions/{EXECUTION}/stream"
            await self._follow(int(headers["last-event-id"]), known, send)

    async def _follow(self, seen: int, known: dict[str, Any], send: Any) -> None:
        await _start(send, 200, list(sse.HEADERS))

        async def event(name: str, data: dict[str, Any], number: int) -> None:
            frame = sse.PING + sse.frame(name, data, event_id=number)
            await send({"type": "http.response.body", "body": frame, "more_body": True})

        pieces = [("stdout", text) for text in self.output] + [("stderr", text) for text in self.errors]
        for number, (stream, text) in enumerate(pieces, 1):
            if number > seen:
                await event("output", {"stream": stream, "data": text}, number)
        while sum(one.path.endswith("/signal") for one in self.seen) < self.ends_after_signals:
            await asyncio.sleep(0.01)
        if self.error_event is not None:
            await event("error", v1.error_shape(*self.error_event), len(pieces))
        elif not self.cut:
            answer = execution_schemas.TaskAnswer(
                task_id=EXECUTION, language="exec", is_complete=True, status="lost" if self.lost else "completed", error=self.lost,
                serialized_stdout="", serialized_stderr="", timed_out=self.timed_out, kernel=self.kernel, **known,
            )  # fmt: skip
            await event("result", answer.model_dump(mode="json"), len(pieces))
        await send({"type": "http.response.body", "body": b""})

    async def _snapshots(self, method: str, path: str, send: Any) -> None:
        found = snapshot(**self.snapshot)
        if not path.endswith("/log"):
            await _answer(send, 200, [found] if (method, path) == ("GET", "/v1/snapshots") else found)
            return
        installing = {
            "stage": "build",
            "step": 1,
            "steps": 2,
            "line": 0,
            "text": "extra_apt_packages git",
            "kept": False,
        }
        await _start(send, 200, list(sse.HEADERS))
        for name, data in (
            ("step", {"text": "unpacking"}),
            ("step", installing),
            ("output", {"data": "half\n"}),
            ("end", self.snapshot_end),
        ):
            await send({"type": "http.response.body", "body": sse.frame(name, data), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _command(self, room: Any, request: schemas.CommandRequest, headers: Any, send: Any) -> None:
        execution = uuid4()
        result = schemas.CommandResult(
            output="".join(self.output), exit_code=self.exit_code, files_changed=self.changes, execution_id=execution,
            output_truncated=False, files_changed_total=self.changes_total or len(self.changes), files_changed_truncated=False,
        )  # fmt: skip
        status = "success" if self.exit_code == 0 else "error"
        answer = schemas.CommandAnswer(instance_id=INSTANCE, command=request.command, result=result, status=status)
        if headers.get("accept") != "text/event-stream":
            await _answer(send, 200, answer)
            return
        await _start(send, 200, list(sse.HEADERS))

        async def event(name: str, data: dict[str, Any]) -> None:
            frame = sse.PING + sse.frame(name, data)
            # In two pieces, so that nothing relies on where the network cuts.
            for piece in (frame[:-5], frame[-5:]):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0)

        await event("started", {"execution_id": str(execution)})
        for text in self.output:
            await event("output", {"data": text})
        if self.error_event is not None:
            await event("error", schemas.error_shape(*self.error_event))
        elif not self.cut:
            await event("result", answer.model_dump(mode="json"))
        await send({"type": "http.response.body", "body": b""})


def organization(name: str, **limits: int | None) -> v1.OrganizationAnswer:
    values: dict[str, Any] = {"id": uuid4(), "max_instances": None, "max_memory_mb": None, "created_at": NOW}
    return v1.OrganizationAnswer(name=name, **{**values, **limits})


def token(name: str, **fields: Any) -> v1.TokenAnswer:
    values: dict[str, Any] = {
        "id": uuid4(), "name": name, "prefix": "rk_live_00000000", "dialect": "gentility", "scopes": ["rooms"],
        "created_at": NOW, "last_used_at": None, "revoked_at": None,
    }  # fmt: skip
    return v1.TokenAnswer(**{**values, **fields})


def room(room_id: str, of: schemas.ProfileAnswer) -> v1.RoomDetail:
    return v1.RoomDetail(
        profile_id=of.id, profile_name=of.name, room_id=room_id, instance_id=uuid4(), status="ready", failure=None,
        isolation=v1.IsolationAnswer(level="gvisor", driver="gvisor", platform="ptrace", reason="faster here"),
        created_at=NOW, last_active_at=None, host=v1.HostName(id=HOST, name="here"),
        boot_trace=[v1.BootStepAnswer(step="active", at_ms=0.25), v1.BootStepAnswer(step="ready", at_ms=3.5)],
    )  # fmt: skip


async def _start(send: Any, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _answer(send: Any, status: int, value: Any) -> None:
    def plain(one: Any) -> Any:
        return one.model_dump(mode="json") if isinstance(one, BaseModel) else one

    body = (
        b""
        if value is None
        else json.dumps([plain(one) for one in value] if isinstance(value, list) else plain(value)).encode()
    )
    await _start(send, status, [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())])
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(app: ScriptedServer, **listen: Any) -> Iterator[uvicorn.Server]:
    """Serve it from a thread until the block ends."""
    config = uvicorn.Config(
        app, **listen, log_level="critical", lifespan="off", ws="none", http="httptools", loop="asyncio"
    )  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(10)
