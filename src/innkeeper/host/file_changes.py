"""`files_changed`: the scanner's rows with their media types, and the memory of which paths were ever reported."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import mimetypes
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from innkeeper.core.host_verbs import path_to_wire
from innkeeper.errors import InnkeeperError
from innkeeper.host.change_result import FileChange, count_changes, read_changes
from innkeeper.host.change_scanner import ChangeScanError, ChangeScanner
from innkeeper.host.change_source import ChangeSource
from innkeeper.host.guest_changes import GuestChanges
from innkeeper.host.machine import Machine
from innkeeper.host.metrics import HostMetrics
from innkeeper.host.mounted_changes import MountedChanges
from innkeeper.host.wire_paths import guest_path_params

log = structlog.stdlib.get_logger(__name__)

ROWS_IN_ANSWER = 1_000
DIGEST_BYTES = 16
REPORTED = "reported"
# 16 MB a room. A guest that reports more paths than that gets no more of them published.
MAX_REPORTED = 1_000_000
SNIFF_SECONDS = 5.0

# Types by name from this table only: the host's /etc/mime.types must not change what clients see.
_BY_NAME = mimetypes.MimeTypes()
for _type, _suffix in (
    ("text/markdown", ".md"),
    ("text/x-python", ".py"),
    ("application/x-ipynb+json", ".ipynb"),
    ("application/vnd.apache.parquet", ".parquet"),
    ("application/yaml", ".yaml"),
    ("application/yaml", ".yml"),
    ("application/toml", ".toml"),
    ("text/x-typescript", ".ts"),
    ("text/plain", ".log"),
    ("font/woff2", ".woff2"),
    ("image/webp", ".webp"),
):
    _BY_NAME.add_type(_type, _suffix)


def mime_by_name(path: bytes) -> str | None:
    """The media type that a path's name tells, or None."""
    name = path.rsplit(b"/", 1)[-1].decode("utf-8", "replace")
    # As a path: a bare name is taken for a URL, so `data:,chart.png` would be text.
    kind, encoding = _BY_NAME.guess_type(f"./{name}", strict=False)
    if encoding is not None:
        return {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}.get(encoding)
    return kind


class FileChanges:
    """Tells what commands changed.

    `directory` holds one folder per instance, which the scanner may write; `records` one that is root's alone, for what the scanner must not touch.
    """

    def __init__(
        self,
        scanner: ChangeScanner,
        directory: Path,
        *,
        records: Path,
        scanner_uid: int,
        scanner_gid: int,
        metrics: HostMetrics | None = None,
    ) -> None:
        self._metrics = metrics or HostMetrics()
        self._mounted, self._inside = MountedChanges(scanner), GuestChanges()
        self._directory = directory
        self._records = records
        self._uid, self._gid = scanner_uid, scanner_gid

    @property
    def scans_saved(self) -> int:
        """Scans that were not needed, since this daemon began."""
        return self._mounted.saved + self._inside.saved

    def _source(self, machine: Machine) -> ChangeSource:
        return self._mounted if machine.driver.capabilities.host_sees_changes else self._inside

    def folder(self, instance_id: UUID) -> Path:
        """The instance's folder: `baseline` and one result file per execution."""
        return self._directory / str(instance_id)

    async def prepare_ahead(self, machine: Machine) -> None:
        """Take the baseline of a guest that nobody has claimed yet, in a folder named by the machine."""
        folder = self._directory / machine.id
        self._make(folder)
        await asyncio.to_thread(self.watch, machine)
        await self.ensure_baseline(machine)

    def prepare(self, machine: Machine, instance_id: UUID) -> None:
        """Make the instance's folder, owned by the scanner: the machine's own where its baseline was taken ahead."""
        folder = self.folder(instance_id)
        try:
            (self._directory / machine.id).rename(folder)
        except FileNotFoundError:
            self._make(folder)

    def _make(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        os.chown(folder, self._uid, self._gid)

    def forget_baseline(self, machine: Machine) -> None:
        """The guest was written to by its configuration: the baseline is taken anew before its first command."""
        self._baseline(machine).unlink(missing_ok=True)
        machine.has_baseline = False

    def release(self, machine: Machine) -> None:
        """Let go of a machine that ends; what belongs to its instance stays. To be called before its disk is unmounted."""
        self._source(machine).release(machine)
        shutil.rmtree(self._directory / machine.id, ignore_errors=True)

    def _baseline(self, machine: Machine) -> Path:
        return self._directory / str(machine.record.instance_id or machine.id) / "baseline"

    def watch(self, machine: Machine) -> None:
        """Let the kernel tell when nothing changed: a command that touched no file then needs no scan."""
        self._source(machine).watch(machine)

    async def ensure_baseline(self, machine: Machine) -> None:
        """Have a baseline before the first command; one that exists (a disk that was used before) stays, so nothing goes unreported."""
        if machine.has_baseline:
            return
        async with machine.scan_lock:
            if machine.has_baseline:
                return
            baseline = self._baseline(machine)
            if not baseline.exists():
                with self._scanning("baseline"):
                    await self._source(machine).take_baseline(machine, baseline)
            machine.has_baseline = True

    async def after_command(self, machine: Machine, execution_id: UUID, *, writes: int | None = None) -> dict[str, Any]:
        """What changed since the last command: `{"files_changed", "files_changed_total", "files_changed_truncated"}`.

        `writes` is how often the guest says that its disk had been written to when the command ended, if it says anything.
        """
        instance_id = machine.record.instance_id
        assert instance_id is not None  # noqa: S101 - only instances run commands
        result = self.folder(instance_id) / f"{execution_id}.changes"
        async with machine.scan_lock:
            with self._scanning("changes"):
                found = await self._source(machine).changes(
                    machine, self._baseline(machine), result=result, limit=ROWS_IN_ANSWER, writes=writes
                )
        if found.total == 0:
            return {"files_changed": [], "files_changed_total": 0, "files_changed_truncated": False}
        rows = await self._rows(machine, found.rows)
        await self._remember(instance_id, result, found.rows, found.total)
        return {
            "files_changed": rows,
            "files_changed_total": found.total,
            "files_changed_truncated": found.total > len(rows),
        }

    @contextlib.contextmanager
    def _scanning(self, kind: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except ChangeScanError as error:
            self._metrics.count_failed_scan(error.code)
            raise
        self._metrics.observe_scan(kind, time.monotonic() - began)

    async def page(
        self, machine: Machine | None, instance_id: UUID, execution_id: UUID, *, cursor: int, limit: int
    ) -> dict[str, Any]:
        """A page of an execution's changes: `{"files_changed", "total", "next_cursor"}`."""
        result = self.folder(instance_id) / f"{execution_id}.changes"
        try:
            changes, following = await asyncio.to_thread(read_changes, result, cursor, limit)
        except FileNotFoundError:
            # The caller knows the execution; one that changed nothing has no result.
            return {"files_changed": [], "total": 0, "next_cursor": None}
        total = await asyncio.to_thread(count_changes, result)
        return {"files_changed": await self._rows(machine, changes), "total": total, "next_cursor": following}

    async def _rows(self, machine: Machine | None, changes: Sequence[FileChange]) -> list[dict[str, Any]]:
        types: list[str | None] = [self._type(change) for change in changes]
        unknown = [index for index, change in enumerate(changes) if types[index] is None and change.status != "deleted"]
        if unknown and machine is not None:
            for index, kind in zip(
                unknown, await _sniff(machine, [changes[index].path for index in unknown]), strict=True
            ):
                types[index] = kind or "application/octet-stream"
        return [
            {
                "path": path_to_wire(change.path),
                "status": change.status,
                "size": 0 if change.status == "deleted" else change.size,
                "mime_type": None if change.status == "deleted" else types[index] or "application/octet-stream",
            }
            for index, change in enumerate(changes)
        ]

    @staticmethod
    def _type(change: FileChange) -> str | None:
        if change.status == "deleted":
            return None
        return "inode/symlink" if change.kind == "symlink" else mime_by_name(change.path)

    async def _remember(self, instance_id: UUID, result: Path, rows: Sequence[FileChange], total: int) -> None:
        """Append digests of the reported paths: what `public_files: reported` allows. 16 bytes a path, on disk only."""
        everything = rows if total == len(rows) else _all_rows(result)
        await asyncio.to_thread(_remember, self._records / str(instance_id) / REPORTED, everything)

    async def was_reported(self, instance_id: UUID, path: bytes) -> bool:
        """Whether a files_changed of the instance ever listed the path."""
        return _digest(path) in await asyncio.to_thread(_digests, self._records / str(instance_id) / REPORTED)


def _remember(reported: Path, rows: Iterable[FileChange]) -> None:
    known = _digests(reported)
    new = {digest for digest in (_digest(change.path) for change in rows) if digest not in known}
    room = MAX_REPORTED - len(known)
    if len(new) > room:
        log.warning("paths beyond the limit are not remembered, and so not public", reported=str(reported))
    if new and room > 0:
        # Only for an instance that is still there: its folder is not made anew.
        with contextlib.suppress(FileNotFoundError), reported.open("ab") as file:
            file.write(b"".join(list(new)[:room]))


def _all_rows(result: Path) -> Iterator[FileChange]:
    following: int | None = 0
    while following is not None:
        rows, following = read_changes(result, following, 10_000)
        yield from rows


def _digest(path: bytes) -> bytes:
    return hashlib.blake2b(path, digest_size=DIGEST_BYTES).digest()


def _digests(path: Path) -> frozenset[bytes]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return frozenset()
    return frozenset(content[at : at + DIGEST_BYTES] for at in range(0, len(content) - DIGEST_BYTES + 1, DIGEST_BYTES))


async def _sniff(machine: Machine, paths: list[bytes]) -> list[str | None]:
    """Media types by content, read by the agent in the guest; None where it cannot tell or does not answer sensibly."""
    nothing: list[str | None] = [None] * len(paths)
    found: list[str | None] = []
    # Long paths: a request must fit a frame.
    step = 32
    for at in range(0, len(paths), step):
        try:
            # Later pages come when the guest may be frozen: unthawed it would be waited for in vain.
            async with machine.in_use():
                answer = await machine.endpoint.request(
                    "mime", guest_path_params(paths[at : at + step]), timeout_seconds=SNIFF_SECONDS
                )
        except InnkeeperError:
            return nothing
        types = answer.get("types")
        if not isinstance(types, list) or len(types) != len(paths[at : at + step]):
            return nothing
        found.extend(
            kind if isinstance(kind, str) and len(kind) <= 127 and kind.isprintable() and kind.isascii() else None
            for kind in types
        )
    return found
