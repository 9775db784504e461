"""Files of volumes: list, read, write, delete; through a VM that has the volume, else in a guest that gets it for that."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from innkeeper.control import files, lifecycle, trees, volume_guests, volumes
from innkeeper.control.access import require
from innkeeper.control.files import FileEntry, FileReader
from innkeeper.control.live_table import Entry
from innkeeper.control.vm_entry import VmEntry
from innkeeper.control.volume_guests import VolumeEntry
from innkeeper.core.host_verbs import path_from_wire, path_to_wire
from innkeeper.core.token import Principal, Scope
from innkeeper.core.volume import MountState, Volume
from innkeeper.errors import FileMissingError, InvalidRequestError, VolumeInUseError

if TYPE_CHECKING:
    from innkeeper.control.context import Control

LIST_MAX = 10_000
PATH_BYTES_MAX = 3_000
# The file system's own, at the top of every volume.
FOUND = "lost+found"
SPECIAL = frozenset("*?[]{},\\")


@dataclass(frozen=True, slots=True)
class VolumeFileWritten:
    """A file that was written: its path in the volume, how many bytes, and whether it is new."""

    path: bytes
    size: int
    created: bool


async def list_files(
    control: Control, principal: Principal, volume_id: UUID, *, prefix: str, recursive: bool, limit: int
) -> list[FileEntry]:
    """What is in the volume and begins with `prefix`, the first `limit`, a directory before what it holds; named by its path from the volume's top.

    Without `recursive` only what is in the directory that the prefix names as far as its last slash. Raises as `read`; no such directory is an empty list.
    """
    if not 1 <= limit <= LIST_MAX:
        raise InvalidRequestError(f"limit: must be between 1 and {LIST_MAX}")
    directory, _, begin = prefix.lstrip("/").rpartition("/")
    pattern = _pattern(begin, recursive=recursive)
    inside = relative(directory.encode(errors="surrogatepass"), name="prefix") if directory else b""
    found: list[FileEntry] = []
    async with _opened(control, principal, volume_id, writing=False) as (entry, top):
        cursor: str | None = None
        while len(found) < limit:
            try:
                page = await trees.glob(control, principal, entry, _below(top, inside), pattern, cursor=cursor)
            except FileMissingError:
                return []
            found += [_named(one, inside) for one in page.entries if inside or not _is_found(one.name)]
            cursor = page.next_cursor
            if cursor is None:
                break
    return found[:limit]


@asynccontextmanager
async def read(
    control: Control,
    principal: Principal,
    volume_id: UUID,
    path: bytes,
    *,
    offset: int = 0,
    length: int | None = None,
) -> AsyncIterator[FileReader]:
    """Open a regular file of a volume.

    Raises:
        VolumeNotFoundError, FileMissingError.
        InvalidRequestError: a directory, or a path that leads out of the volume.
        VolumeInUseError: the volume is just coming to a VM, or going.
        DriverNotOfferedError: a virtual machine has written the volume, and its host runs none now.
        ConflictError: the volume is not ready.
        RateLimitedError, NoHostError, UnavailableError: no guest can be had for it now.

    """
    inside = relative(path)
    async with (
        _opened(control, principal, volume_id, writing=False) as (entry, top),
        files.read(control, principal, entry, _below(top, inside), offset=offset, length=length) as reader,
    ):
        yield reader


async def write(
    control: Control,
    principal: Principal,
    volume_id: UUID,
    path: bytes,
    chunks: AsyncIterable[bytes],
    *,
    replace: bool,
    max_bytes: int | None = None,
) -> VolumeFileWritten:
    """Write a file, whole or not at all; missing directories are made.

    Raises as `read`, and:
        ConflictError: the volume is full; or without `replace` the name is taken.
        VolumeInUseError: VMs may read the volume, who are named: nobody writes then.
        PayloadTooLargeError.

    """
    inside = relative(path)
    async with _opened(control, principal, volume_id, writing=True) as (entry, top):
        place = _below(top, inside)
        written = await files.write(control, principal, entry, place, chunks, replace=replace, max_bytes=max_bytes)
        await _keep(control, principal, entry)
    return VolumeFileWritten(inside, written.size, written.created)


async def remove(control: Control, principal: Principal, volume_id: UUID, path: bytes, *, recursive: bool) -> bytes:
    """Remove a file, an empty directory, or with `recursive` a whole one; its path in the volume. Raises as `write`."""
    inside = relative(path)
    async with _opened(control, principal, volume_id, writing=True) as (entry, top):
        await trees.remove(control, principal, entry, _below(top, inside), recursive=recursive)
        await _keep(control, principal, entry)
    return inside


async def is_directory(control: Control, principal: Principal, volume_id: UUID, path: bytes) -> bool:
    """Whether there is a directory. Raises as `read`, but for a path where nothing is."""
    inside = relative(path)
    async with _opened(control, principal, volume_id, writing=False) as (entry, top):
        try:
            return (await files.stat(control, principal, entry, _below(top, inside))).type == "dir"
        except FileMissingError:
            return False


def relative(path: bytes, *, name: str = "path") -> bytes:
    """A path as it is from the volume's top. Raises InvalidRequestError, naming the field."""
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if not parts or b".." in parts:
        raise InvalidRequestError(f"{name}: must name something in the volume, without ..")
    if len(path) > PATH_BYTES_MAX or b"\0" in path:
        raise InvalidRequestError(f"{name}: at most {PATH_BYTES_MAX} bytes, and no NUL")
    return b"/".join(parts)


@asynccontextmanager
async def _opened(
    control: Control, principal: Principal, volume_id: UUID, *, writing: bool
) -> AsyncIterator[tuple[Entry, bytes]]:
    """Where a volume's files are for the block: in which guest, and at which path there."""
    require(principal, Scope.ROOMS)
    volume = await volumes.own(control, principal, volume_id)
    volumes.check_ready(volume)
    having = volume_guests.holders(control, volume.id)
    if not having:
        async with control.volume_guests.opened(control, volume) as entry:
            yield entry, volume_guests.PATH.encode()
    elif writing and having[0].mounts[volume.id].read_only:
        named = ", ".join(sorted(one.vm.vm_id for one in having))
        raise VolumeInUseError(f"The volume is attached to {named}, which may only read it: nobody writes to it now")
    else:
        async with _through_vm(control, principal, having[0], volume) as top:
            yield having[0], top


@asynccontextmanager
async def _through_vm(control: Control, principal: Principal, vm: VmEntry, volume: Volume) -> AsyncIterator[bytes]:
    await lifecycle.ready(control, principal, vm)
    async with AsyncExitStack() as through:
        # Whoever takes the volume away holds the same lock, and waits for the transfers that have begun: below the path is the VM's own disk then.
        async with vm.mounting:
            mount = vm.mounts.get(volume.id)
            if mount is None or mount.state is not MountState.ATTACHED or not vm.ready:
                raise VolumeInUseError(f"The volume is just coming to {vm.vm.vm_id}, or going")
            await through.enter_async_context(control.volume_guests.through_vm(volume.id))
        yield mount.path.encode()


async def _keep(control: Control, principal: Principal, entry: Entry) -> None:
    """In a VM it is as durable as whatever the VM writes; of a guest that goes nothing may be lost."""
    if isinstance(entry, VolumeEntry):
        await volume_guests.sync(control, principal, entry)


def _pattern(begin: str, *, recursive: bool) -> str:
    literal = "".join(f"\\{character}" if character in SPECIAL else character for character in begin)
    if not begin:
        return "**" if recursive else "*"
    return f"{{{literal}*,{literal}*/**}}" if recursive else f"{literal}*"


def _below(top: bytes, inside: bytes) -> bytes:
    return top + b"/" + inside if inside else top


def _is_found(name: str) -> bool:
    return name == FOUND or name.startswith(f"{FOUND}/")


def _named(one: FileEntry, inside: bytes) -> FileEntry:
    path = path_to_wire(_below(inside, path_from_wire(one.name))) if inside else one.name
    return FileEntry(path, one.type, one.size, one.mode, one.mtime_ns)
