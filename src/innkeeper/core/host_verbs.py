"""What the API process asks of a host daemon: one frozen dataclass per verb, carried as JSON over the bus.

The daemon validates each against its dataclass (strict, unknown fields refused) before it does anything. A verb's answer is
a JSON object; verbs that stream say so. Errors travel as codes of `innkeeper.errors`.
Paths inside guests are bytes; they travel as text, see `path_to_wire`.
"""

from __future__ import annotations

import base64
import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from uuid import UUID


@dataclass(frozen=True, slots=True)
class MachineShape:
    """What a ready guest is made of; guests of equal `pool_key` are interchangeable until they are configured."""

    pool_key: str
    image_digest: str
    driver: str
    vcpu_count: int
    memory_mb: int
    disk_mb: int
    egress_mode: str
    # Lines run once before a pooled guest is frozen, so that a claim finds bash and python in the page cache.
    user: str = "root"
    # Of the egress mode `limited`: TCP ports anywhere, and networks as a whole.
    egress_ports: tuple[int, ...] = ()
    egress_cidrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EnsureMachine:
    """Make the instance's machine ready: claim a warm guest, start a cold one, or restart on the kept disk. Idempotent.

    A suspended one goes on with its memory; where that cannot be used here any more it starts on its disk. What cannot be done now leaves it suspended.

    `hostname` names a guest that starts cold; one from a pool has its name already, and a disk keeps the name that it began with.

    Streams: `{"step": str, "at_ms": float}` per provisioning step, spelled as InstanceState.
    Answer: `{"boot_trace": [{"step", "at_ms"}], "isolation": {"level", "driver", "platform", "reason", "accelerator"}, "claimed": bool,
    "woken": {"with_memory": bool, "reason": why not}|None}`.
    Errors: service_unavailable (no room on the host, or not this driver), instance_failed, image_not_found.
    """

    verb: ClassVar[str] = "machine.ensure"
    instance_id: UUID
    shape: MachineShape
    hostname: str
    user: str | None = None
    workdir: str | None = None
    env: dict[str, str] = field(default_factory=dict, repr=False)
    # For image builds: a kept step whose disk the new one is a copy of, and a guest in which nothing runs but what is asked for.
    step_key: str | None = None
    bare: bool = False


@dataclass(frozen=True, slots=True)
class DestroyMachine:
    """Take the machine away, and the disk, journals and baselines too unless `keep_disk`. Idempotent; the answer `{}` comes when the guest no longer runs."""

    verb: ClassVar[str] = "machine.destroy"
    instance_id: UUID
    keep_disk: bool = False


@dataclass(frozen=True, slots=True)
class ListMachines:
    """What the host has of machines and disks.

    Answer: `{"machines": [{"instance_id", "ready": bool, "frozen": bool, "idle_seconds": float, "user_processes": int, "memory_mb": int,
    "failure": str|None}], "disks": [instance_id]}`.
    """

    verb: ClassVar[str] = "machine.list"


@dataclass(frozen=True, slots=True)
class Execute:
    """Run a shell line in a ready machine; or with `argv` a program without a shell; or with `kernel` a cell of Python in the interpreter of that name.

    `merge`: one output; else stderr comes as channel 2. `exact_env`, of image builds: an environment of `env` and HOME alone, and no scan for changes.
    The opener sends DATA (stdin, when `stdin`) and END. Streams: DATA output, at most `answer_bytes` of each channel unless `stream`.
    Answer: `{"exit_code", "signal", "timed_out", "duration_ms", "started_at", "cpu_ms": float|None, "output_bytes", "stderr_bytes", "output_truncated",
    "kernel": {"fresh": bool, "lost": bool}|None, "result_bytes", "results_truncated",
    "files_changed": [{"path", "status", "size", "mime_type"}], "files_changed_total", "files_changed_truncated"}`.
    With `detach` nothing is streamed and the answer is `{}`, as soon as the guest has begun.
    CANCEL leaves the command running; its journal is kept.
    Errors of those that could not begin: invalid_request (`argv`, `cwd`, `user` or no Python for a cell).
    """

    verb: ClassVar[str] = "exec"
    instance_id: UUID
    execution_id: UUID
    command: str
    timeout_seconds: float
    cwd: str | None = None
    env: dict[str, str] = field(default_factory=dict, repr=False)
    stdin: bool = False
    stream: bool = False
    answer_bytes: int = 1_048_576
    argv: tuple[str, ...] = ()
    user: str | None = None
    merge: bool = True
    exact_env: bool = False
    kernel: str | None = None
    detach: bool = False


@dataclass(frozen=True, slots=True)
class ReadOutput:
    """Read the kept output of an execution.

    Streams: MESSAGE of the record (`{"started_at", "total_bytes", "stderr_bytes", "gap": {"from", "to"}|None, "ended": bool, "exit_code": int|None,
    "signal", "timed_out", "duration_ms", "cpu_ms", "lost": str|None, "kernel", "result_bytes", "results_truncated"}`) with the `"offset"` that is begun
    at, then DATA of at most `limit` bytes, stderr as channel 2; with `each` the first `limit` bytes of each channel. Answer: `{"next_offset"}`.
    An offset inside the dropped middle is moved to the end of the gap. Errors: execution_not_found.
    """

    verb: ClassVar[str] = "execution.output"
    instance_id: UUID
    execution_id: UUID
    offset: int = 0
    limit: int = 1_048_576
    each: bool = False


@dataclass(frozen=True, slots=True)
class FollowOutput:
    """Read an execution's output from `offset` on, until the command has ended.

    Streams: DATA, stderr as channel 2, and before each piece that does not follow the one before (a dropped middle) MESSAGE `{"offset"}`.
    Answer: the record as of `ReadOutput`. Errors: execution_not_found.
    """

    verb: ClassVar[str] = "execution.follow"
    instance_id: UUID
    execution_id: UUID
    offset: int = 0


@dataclass(frozen=True, slots=True)
class ReadResults:
    """What a cell displayed. Streams: DATA as `core.cell_results` reads it. Answer: `{}`. Errors: execution_not_found."""

    verb: ClassVar[str] = "execution.results"
    instance_id: UUID
    execution_id: UUID


@dataclass(frozen=True, slots=True)
class SignalExecution:
    """Send a signal to a running execution's process group; to a cell, SIGINT interrupts it.

    Answer: `{}`. Errors: conflict (it has ended), execution_not_found.
    """

    verb: ClassVar[str] = "execution.signal"
    instance_id: UUID
    execution_id: UUID
    signal: int


@dataclass(frozen=True, slots=True)
class ReadFilesChanged:
    """A page of an execution's file changes. Answer: `{"files_changed": [...], "total", "next_cursor": int|None}`. Errors: execution_not_found."""

    verb: ClassVar[str] = "execution.files_changed"
    instance_id: UUID
    execution_id: UUID
    cursor: int = 0
    limit: int = 1_000


@dataclass(frozen=True, slots=True)
class ReadFile:
    """Read a regular file of a guest.

    `public`: None for a request with a token; else the profile's `public_files` (`reported` or `all`): regular files only, never under /proc, /sys, /dev,
    /run, and with `reported` only paths that a files_changed of the instance listed.
    Streams: MESSAGE `{"size", "mtime_ns", "ctime_ns", "inode", "mime"}`, DATA. Answer: `{"bytes"}`.
    Errors: file_not_found, invalid_request (a directory), payload_too_large (`max_bytes`).
    """

    verb: ClassVar[str] = "file.read"
    instance_id: UUID
    path: str
    offset: int = 0
    length: int | None = None
    max_bytes: int | None = None
    public: str | None = None


@dataclass(frozen=True, slots=True)
class StatFile:
    """What a path is; of a symlink, unless `follow`, the link itself.

    Answer: `{"type", "size", "mode", "uid", "gid", "mtime_ns", "target": str|None}`. Errors: file_not_found.
    """

    verb: ClassVar[str] = "file.stat"
    instance_id: UUID
    path: str
    follow: bool = True


@dataclass(frozen=True, slots=True)
class WriteFile:
    """Write a file atomically, parents made. The opener sends DATA and END. Answer: `{"bytes", "created"}`. CANCEL leaves nothing.

    Errors: conflict (the disk is full; or without `replace` the name is taken).
    """

    verb: ClassVar[str] = "file.write"
    instance_id: UUID
    path: str
    mode: int | None = None
    replace: bool = True


@dataclass(frozen=True, slots=True)
class ListFiles:
    """One page of a directory.

    Answer: `{"entries": [{"name", "type", "size", "mode", "mtime_ns"}], "next_cursor": str|None}`.
    Errors: file_not_found, invalid_request (not a directory).
    """

    verb: ClassVar[str] = "file.list"
    instance_id: UUID
    path: str
    cursor: str | None = None
    limit: int = 1_000


@dataclass(frozen=True, slots=True)
class WarmPool:
    """How many ready guests of a shape to keep, and the identity that they are given ahead.

    A claim that asks for the same user, workdir and env needs nothing but a thaw. `hostname` is extended by the machine's own suffix.
    """

    shape: MachineShape
    size: int
    hostname: str = "room"
    user: str | None = None
    workdir: str | None = None
    env: dict[str, str] = field(default_factory=dict, repr=False)
    # Whom it is for, which is all that metrics tell of a pool.
    kind: Literal["room", "vm"] = "room"


@dataclass(frozen=True, slots=True)
class SetPools:
    """The whole desired set of warm pools; pools that are absent are drained. Answer: `{}` at once; filling goes on beside."""

    verb: ClassVar[str] = "pools.set"
    pools: tuple[WarmPool, ...] = ()


@dataclass(frozen=True, slots=True)
class ListImages:
    """Answer: `{"images": [Image as an object], "agents": [{"id", "table"}], "agent_version": str}`.

    A table is what `core.agent.parse_agent` reads; the version is the guest agent's.
    """

    verb: ClassVar[str] = "image.list"


@dataclass(frozen=True, slots=True)
class CollectImages:
    """Remove the files of images that organizations made and that no name stands for any more. `keep` are the digests of those that some name has.

    What a disk or a machine stands on stays until a later call, and so does what is being handed over. Answer: `{"removed": [digest], "freed_bytes": int}`.
    """

    verb: ClassVar[str] = "image.collect"
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImportImage:
    """Make an image of an OCI image.

    `kind` is `registry` (with `reference`, and `username` and `password` where the registry wants them), `oci-archive` or `docker-archive`: the opener
    sends the archive as DATA, and then the MESSAGE `{"sent": true}`.
    Streams: MESSAGE `{"step": str}`, `{"line": str}`, and at last `{"made": {"digest", "size_bytes", "config", "known"}}`. From then until the opener's END
    the file is kept although no name stands for it yet. CANCEL leaves nothing. Answer: `{}`.
    Errors: invalid_request (with the reason, for whoever imports), service_unavailable.
    """

    verb: ClassVar[str] = "image.import"
    kind: str
    reference: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class HostStatus:
    """What the host is and holds.

    Answer: `{"host_id", "name", "drivers": [Offer of core.isolation, as an object], "cpus", "memory_mb", "memory_committed_mb", "disk_free_mb",
    "machines", "frozen", "pools": [{"pool_key", "size", "ready"}], "leaked",
    "leaks": [{"kind", "name", "owner"}], "version"}`.
    """

    verb: ClassVar[str] = "host.status"


@dataclass(frozen=True, slots=True)
class WatchHost:
    """Streams MESSAGE events until cancelled.

    `{"type": "machine.failed", "instance_id", "failure"}`, `{"type": "image.changed", "name", "status"}`, `{"type": "pool.ready", "pool_key"}`.
    """

    verb: ClassVar[str] = "host.watch"


@dataclass(frozen=True, slots=True)
class Diagnose:
    """Look into the daemon's process for its operator. `kind` is `stacks`, `tasks` or `memory`; the answers are those of `Diagnosis.ask`."""

    verb: ClassVar[str] = "host.diagnose"
    kind: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class DiagnoseGuest:
    """Where the goroutines of a guest's agent are. Answer: `{"text"}`, which a guest said. Errors: instance_not_found, guest_error."""

    verb: ClassVar[str] = "machine.diagnose"
    instance_id: UUID


@dataclass(frozen=True, slots=True)
class SetLogLevel:
    """Log from `level` on until the daemon ends; None changes nothing. Answer: `{"level"}`."""

    verb: ClassVar[str] = "host.log_level"
    level: str | None = None


@dataclass(frozen=True, slots=True)
class ReadMetrics:
    """What the daemon measures of itself. Answer: `{"families": [{"name", "type", "help", "samples": [[name, labels, value]]}]}`."""

    verb: ClassVar[str] = "host.metrics"


@dataclass(frozen=True, slots=True)
class CollectGarbage:
    """What takes disk space and nothing needs; removed when `remove` says so. `keep_images` are the digests that some organization's image names,
    `keep_checkpoints` and `keep_volumes` the checkpoints and volumes that somebody owns; others are garbage an hour after they were made, or written.
    Volumes are users' data: they are removed only with `remove_volumes`, too.

    Answer: `{"items": [{"kind", "name", "size_bytes"}]}`: what could go, or went.
    """

    verb: ClassVar[str] = "host.gc"
    remove: bool = False
    keep_images: tuple[str, ...] = ()
    keep_checkpoints: tuple[UUID, ...] = ()
    keep_volumes: tuple[UUID, ...] = ()
    remove_volumes: bool = False


@dataclass(frozen=True, slots=True)
class MeasureDisk:
    """What takes the space of the host's directory.

    Answer: `{"items": [{"kind", "id", "size_bytes", "own_bytes"}]}`, see `host.disk_use.DiskUse`. Every file is looked at: seconds for thousands of disks.
    """

    verb: ClassVar[str] = "host.disk_use"


@dataclass(frozen=True, slots=True)
class ReadUsage:
    """What machines have used since an instance has them. `counted` are the ended ones of an earlier answer, which are forgotten.

    Answer: `{"running": [Used], "ended": [Used]}`, of the ended ones at most 1,000, with Used = `{"machine_id", "instance_id", "cpu_us": int,
    "memory_mb": int, "seconds": float}`: sums from the machine's first moment with the instance, the start of its guest included in `cpu_us`.
    """

    verb: ClassVar[str] = "host.usage"
    counted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DescribeCapacity:
    """What the host has room for.

    Answer: `{"memory_mb", "memory_reserve_mb", "memory_overcommit", "memory_limit_mb", "memory_committed_mb", "memory_warm_mb" (of these, what warm
    guests would give up), "disk_free_mb", "disk_reserve_mb", "disk_pool_mb", "slots", "slots_used", "starts_waiting", "executions_waiting"}`.
    """

    verb: ClassVar[str] = "host.capacity"


@dataclass(frozen=True, slots=True)
class BackupHost:
    """Every instance's disk, records and finished executions, all volumes, and the images, as the members of an archive (`innkeeper.archive`) without its end.

    Streams: MESSAGES `{"staged": [instance_id]}` and `{"staged_volumes": {volume_id: size_mb}}` of at most 1,000 ids each, instances and volumes as they are
    from then on; MESSAGE `{"estimate_bytes": int}`; DATA. Answer: `{"manifest_sha256": str, "instances": int, "volumes": int}`. Errors: conflict (one is
    being made already).
    """

    verb: ClassVar[str] = "host.backup"


VERBS: tuple[type[Any], ...] = (
    EnsureMachine,
    DestroyMachine,
    ListMachines,
    Execute,
    ReadOutput,
    FollowOutput,
    ReadResults,
    SignalExecution,
    ReadFilesChanged,
    ReadFile,
    StatFile,
    WriteFile,
    ListFiles,
    SetPools,
    ListImages,
    CollectImages,
    ImportImage,
    HostStatus,
    WatchHost,
    Diagnose,
    DiagnoseGuest,
    SetLogLevel,
    ReadMetrics,
    CollectGarbage,
    DescribeCapacity,
    ReadUsage,
    MeasureDisk,
    BackupHost,
)


def to_wire(request: Any) -> dict[str, Any]:
    """The JSON object of a verb's dataclass, without the verb itself."""
    plain: dict[str, Any] = _plain(request)
    return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def path_to_wire(path: bytes) -> str:
    """A path or name as JSON text: UTF-8 as it is; other bytes, and a name that begins so itself, as `b64:` + base64."""
    try:
        text = path.decode()
    except UnicodeDecodeError:
        text = "b64:"
    return "b64:" + base64.b64encode(path).decode() if text.startswith("b64:") else text


def path_from_wire(text: str) -> bytes:
    """The bytes of `path_to_wire`'s text. Raises ValueError for bad base64."""
    if text.startswith("b64:"):
        return base64.b64decode(text[4:], validate=True)
    return text.encode()
