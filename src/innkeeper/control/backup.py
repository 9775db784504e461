"""A backup of the whole state while the server runs, as one stream of bytes: a tar file, see `innkeeper.archive`.

The host holds its disks fast first; the database is copied after that, and what it has beyond those disks is taken out of the copy. So the backup is of
the moment of the disks: a room that was made later is not in it, and one that was destroyed meanwhile has no row.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper import __version__
from innkeeper.archive.manifest import MANIFEST, manifest_bytes
from innkeeper.archive.members import END, ArchiveWriter
from innkeeper.bus.contract import Call, Data, Message
from innkeeper.control import audit, clock
from innkeeper.control.access import require_socket
from innkeeper.control.secrets import KEY_FILE
from innkeeper.core.host_verbs import BackupHost, to_wire
from innkeeper.core.ssh_key import HOST_KEY_FILE
from innkeeper.core.token import Principal
from innkeeper.errors import UnavailableError
from innkeeper.store import audit_events, instances, snapshots, volumes

if TYPE_CHECKING:
    from innkeeper.control.context import Control

DATABASE = "innkeeper.db"
STAGE_SECONDS = 600.0


class Backup:
    """A backup whose disks are held fast: `pieces` is read once."""

    def __init__(
        self, call: Call, events: AsyncIterator[Any], own: ArchiveWriter, descriptors: list[tuple[str, int]]
    ) -> None:
        self.instances = 0
        self.estimate_bytes = 0
        self._call = call
        self._events = events
        self._own = own
        self._descriptors = descriptors

    async def pieces(self) -> AsyncIterator[bytes]:
        """The bytes. Raises the typed error of the host; what came until then is no backup."""
        mine = self._members()
        while (piece := await asyncio.to_thread(next, mine, None)) is not None:
            yield piece
        async for event in self._events:
            if isinstance(event, Data):
                yield event.data
        told = await self._call.result()
        facts = {
            "version": __version__,
            "created_at": clock.now().isoformat(),
            "instances": int(told["instances"]),
            "volumes": int(told["volumes"]),
            "host_manifest_sha256": str(told["manifest_sha256"]),
        }
        end = self._own.text(MANIFEST, manifest_bytes(facts, self._own.entries))
        yield b"".join((*end, END))

    def _members(self) -> Iterator[bytes]:
        for name, descriptor in self._descriptors:
            yield from self._own.file(name, descriptor)


@asynccontextmanager
async def begin(control: Control, principal: Principal) -> AsyncIterator[Backup]:
    """A backup, ready to be read. Only the operator may, over the server's own socket: it holds the key and everybody's disks.

    Raises:
        ConflictError: one is being made already.
        UnavailableError: the host cannot be asked.

    """
    require_socket(principal)
    hosts = control.bus.hosts()
    if len(hosts) != 1:
        raise UnavailableError("The host is not reachable")
    async with contextlib.AsyncExitStack() as stack:
        call = await stack.enter_async_context(control.bus.open(hosts[0], BackupHost.verb, to_wire(BackupHost())))
        events = call.events()
        async with asyncio.timeout(STAGE_SECONDS):
            staged = await _staged(events)
        made = Backup(call, events, ArchiveWriter(), await _own_files(control, hosts[0], staged, stack))
        made.instances = len(staged.instances)
        made.estimate_bytes = staged.estimate_bytes + sum(os.fstat(fd).st_size for _, fd in made._descriptors)
        event = audit.event(principal, "backup.create", "host", hosts[0], {"instances": str(made.instances)})
        await control.database.write(audit_events.insert, event)
        yield made


@dataclass(slots=True)
class _Staged:
    """What the host's half will have: instances, volumes with their sizes in MiB, digests of images, and about how many bytes all that is."""

    instances: set[UUID] = field(default_factory=set)
    volumes: dict[UUID, int] = field(default_factory=dict)
    images: set[str] = field(default_factory=set)
    estimate_bytes: int = 0


async def _staged(events: AsyncIterator[Any]) -> _Staged:
    staged = _Staged()
    async for event in events:
        if isinstance(event, Message):
            body = event.body
            staged.instances.update(UUID(one) for one in body.get("staged", ()))
            staged.volumes.update({UUID(one): int(size) for one, size in body.get("staged_volumes", {}).items()})
            staged.images.update(map(str, body.get("staged_images", ())))
            if "estimate_bytes" in body:
                staged.estimate_bytes = int(body["estimate_bytes"])
                return staged
    raise UnavailableError("The host ended the backup before it began")


async def _own_files(
    control: Control, host_id: UUID, staged: _Staged, stack: contextlib.AsyncExitStack
) -> list[tuple[str, int]]:
    """Open descriptors of the database's copy and the keys, closed by `stack`; the copy has no name any more."""
    settings = control.settings
    await control.later.flush(control)
    folder = settings.api_dir / "backup"
    sweep(control)
    folder.mkdir(mode=0o700)
    try:
        copy = folder / DATABASE

        def only_staged(connection: sa.Connection) -> None:
            instances.forget_others(connection, host_id, staged.instances, clock.now())
            snapshots.without_checkpoints(connection, staged.images, "Snapshots of VMs are not part of backups")
            volumes.forget_others(connection, host_id, staged.volumes, "It was made while the backup was")

        await control.database.copy_to(copy, only_staged)
        opened = [_opened(copy, stack)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if settings.master_key is None:
        opened.append(_opened(settings.api_dir / KEY_FILE, stack))
    # Clients know the server by it. There is none where no SSH gateway ever was.
    with contextlib.suppress(FileNotFoundError):
        opened.append(_opened(settings.api_dir / HOST_KEY_FILE, stack))
    return opened


def _opened(path: Path, stack: contextlib.AsyncExitStack) -> tuple[str, int]:
    """The member's name, and a descriptor that `stack` closes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return f"api/{path.name}", descriptor


def sweep(control: Control) -> None:
    """Remove the copy of a database that a killed process left in the middle of a backup."""
    shutil.rmtree(control.settings.api_dir / "backup", ignore_errors=True)
