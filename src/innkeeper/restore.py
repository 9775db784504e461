"""`inn restore`: a backup becomes a state directory. Needs root, an empty directory, and no server on it.

Everything is put beside its place first, checked, and then moved there. A mark in the directory says that this is under way: no server starts on it, and the
next `inn restore` begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import pwd
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from innkeeper.archive.manifest import (
    GUEST_WRITTEN,
    HOST_MANIFEST,
    IMMUTABLE,
    MANIFEST,
    MANIFEST_MAX_BYTES,
    check,
    parse_manifest,
)
from innkeeper.archive.members import END, ArchiveError, Entry, Member, members
from innkeeper.errors import ConflictError, InnkeeperError, InvalidRequestError
from innkeeper.host.disks.disk_pool import DiskPool, open_pool
from innkeeper.host.disks.volume_store import IMMUTABLE_MODE
from innkeeper.host.linux import command, guest_written, mounts
from innkeeper.ids import parse_uuid
from innkeeper.settings import Settings

RESTORING = "restoring"
SYNC_SECONDS = 3_600.0
SCANNER_USER = "nobody"
NEEDED = ("api/innkeeper.db", "host/host-id", "host/server-uuid")
Progress = Callable[[int], None]


@dataclass(slots=True)
class Restored:
    """What a backup held. Sizes are those of the files, and of what they take in the archive."""

    version: str = ""
    created_at: str = ""
    instances: int = 0
    disks: int = 0
    disk_bytes: int = 0
    archived_bytes: int = 0
    volumes: int = 0
    has_key: bool = False
    entries: dict[str, Entry] = field(default_factory=dict)
    # Names of members, as of `archive.manifest`.
    guest_written: tuple[str, ...] = ()
    immutable: tuple[str, ...] = ()


async def restore(settings: Settings, archive: Path, *, progress: Progress = lambda _: None) -> Restored:
    """Make the state directory of the settings what the archive holds.

    Raises:
        ConflictError: the directory is not empty, or a server runs on it.
        ArchiveError: the archive is damaged or incomplete; nothing is left of it.
        InvalidRequestError: not root, or a user is missing. OSError: the disk is full, or the archive cannot be read.

    """
    if os.geteuid() != 0:
        raise InvalidRequestError("inn restore needs root")
    owner = _account(settings.api_user)
    home = settings.home
    home.mkdir(mode=0o755, parents=True, exist_ok=True)
    with archive.open("rb") as file, _alone(home):
        await _clear(home)
        fresh = home / RESTORING
        try:
            found = await _unpack(settings, file, fresh, progress)
        except BaseException:
            await asyncio.shield(_clear(home))
            raise
        _own(fresh / "api", owner)
        _own(fresh / "host" / "changes", pwd.getpwnam(SCANNER_USER), top=False)
        await command.run(["sync", "--file-system", os.fspath(fresh)], timeout_seconds=SYNC_SECONDS)
        for name in ("host", "api"):
            (fresh / name).rename(home / name)
        fresh.rmdir()
        _sync(home)
    return found


def verify(archive: Path, *, progress: Progress = lambda _: None) -> Restored:
    """What the archive holds, after every byte of it was read and held against the manifests. Raises ArchiveError, OSError."""
    with archive.open("rb") as file:
        return _read(file, lambda _: None, progress)


def refuse_unfinished(settings: Settings) -> str | None:
    """Why a server must not start on the directory: half of a backup is in it. None where that is not so."""
    if (settings.home / RESTORING).exists():
        return f"a restore into {settings.home} was not finished\nFIX: inn restore, once more"
    return None


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Neither a server nor another restore on the directory. The server's lock lies in a folder that may not exist."""
    with contextlib.ExitStack() as stack:
        for path in (home, home / "host" / "lock"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConflictError(f"a server or another restore runs on {home}") from None
        yield


async def _clear(home: Path) -> None:
    """Take away what an unfinished restore left; anything else in the directory is somebody's."""
    fresh = home / RESTORING
    if fresh.exists():
        await mounts.umount_tree(fresh)
        # It began in an empty directory, so what was moved into place already is its own.
        for path in (home / "host", home / "api", fresh):
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
    left = sorted(
        path.name for path in await asyncio.to_thread(lambda: list(home.iterdir())) if path.name != "lost+found"
    )
    if left:
        raise ConflictError(
            f"{home} is not empty ({', '.join(left[:3])}); a backup is restored into an empty directory"
        )


async def _unpack(settings: Settings, file: BinaryIO, fresh: Path, progress: Progress) -> Restored:
    host = fresh / "host"
    for path in (fresh, fresh / "api", host, host / "images", host / "instances"):
        path.mkdir(mode=0o700)
    (host / "changes").mkdir(mode=0o711)
    pool = await open_pool(host, size_mib=settings.pool_disk_mb)
    try:
        return await asyncio.to_thread(_restored, file, lambda name: _place(name, fresh, pool), progress)
    finally:
        await pool.close()


def _restored(file: BinaryIO, place: Callable[[str], Path], progress: Progress) -> Restored:
    found = _read(file, place, progress)
    for name in found.guest_written:
        with place(name).open("rb+") as image:
            guest_written.mark(image.fileno())
    for name in found.immutable:
        place(name).chmod(IMMUTABLE_MODE)
    return found


def _place(name: str, fresh: Path, pool: DiskPool) -> Path:
    """Where a member belongs. Raises ArchiveError for one that belongs nowhere."""
    match name.split("/"):
        case ["host", "disks", disk] if disk.endswith(".img"):
            return pool.disk_path(disk.removesuffix(".img"))
        case ["host", "volumes", one] if one.endswith(".img") and parse_uuid(one.removesuffix(".img")) is not None:
            folder = pool.directory / "volumes"
        case ["host", "host-id" | "server-uuid" as one]:
            return fresh / "host" / one
        case ["host", "images", one]:
            return fresh / "host" / "images" / one
        case ["host", "changes" | "instances" as kind, instance, one]:
            folder = fresh / "host" / kind / instance
        case ["host", "instances", instance, "journals", one]:
            folder = fresh / "host" / "instances" / instance / "journals"
        case ["api", "innkeeper.db" | "master.key" | "ssh-host-key" as one]:
            return fresh / "api" / one
        case _:
            raise ArchiveError(f"{name}: not known to this version of the server")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / one


def _read(file: BinaryIO, place: Callable[[str], Path | None], progress: Progress) -> Restored:
    """Read the whole archive, writing each member where `place` says, and hold it against its manifests."""
    found: dict[str, Entry] = {}
    manifests: dict[str, bytes] = {}
    for member in members(file):
        if member.name in found or member.name in manifests:
            raise ArchiveError(f"{member.name} is there twice")
        if member.name in (MANIFEST, HOST_MANIFEST):
            manifests[member.name], _ = member.read(MANIFEST_MAX_BYTES)
        else:
            found[member.name] = _save(member, place(member.name))
        progress(file.tell())
    if file.read(len(END) - 512) != END[512:] or file.read(1):
        raise ArchiveError("something follows the end")
    return _checked(found, manifests)


def _save(member: Member, target: Path | None) -> Entry:
    if target is None:
        return member.save(None)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        return member.save(descriptor)
    finally:
        os.close(descriptor)


def _checked(found: dict[str, Entry], manifests: dict[str, bytes]) -> Restored:
    for name in (MANIFEST, HOST_MANIFEST):
        if name not in manifests:
            raise ArchiveError(f"{name} is missing: the backup was not finished")
    facts, own = parse_manifest(manifests[MANIFEST])
    if hashlib.sha256(manifests[HOST_MANIFEST]).hexdigest() != facts.get("host_manifest_sha256"):
        raise ArchiveError(f"{HOST_MANIFEST} is not what it was when it was backed up")
    facts_of_host, of_host = parse_manifest(manifests[HOST_MANIFEST])
    check(found, {**own, **of_host})
    for name in NEEDED:
        if name not in found:
            raise ArchiveError(f"{name} is missing")
    disks = [entry for name, entry in found.items() if name.startswith("host/disks/")]
    return Restored(
        version=str(facts.get("version", "")),
        created_at=str(facts.get("created_at", "")),
        instances=int(facts.get("instances", 0)),
        disks=len(disks),
        disk_bytes=sum(disk.size for disk in disks),
        archived_bytes=sum(entry.bytes for entry in found.values()),
        volumes=sum(name.startswith("host/volumes/") for name in found),
        has_key="api/master.key" in found,
        entries=found,
        guest_written=_named(facts_of_host, GUEST_WRITTEN, found),
        immutable=_named(facts_of_host, IMMUTABLE, found),
    )


def _named(facts: Mapping[str, Any], fact: str, found: Mapping[str, Entry]) -> tuple[str, ...]:
    """Names of members, none in an archive of an earlier format. Raises ArchiveError for one that is not there."""
    names = tuple(map(str, facts.get(fact, ())))
    if not found.keys() >= set(names):
        raise ArchiveError("the manifest is damaged")
    return names


def _account(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise InvalidRequestError(f"there is no user {name!r}, who is to own the database") from None


def _own(folder: Path, account: pwd.struct_passwd, *, top: bool = True) -> None:
    for path in (*([folder] if top else []), *folder.rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore_now(settings: Settings, archive: Path, *, progress: Progress = lambda _: None) -> Restored:
    """`restore`, for a caller without an event loop. Raises InnkeeperError with a sentence for people."""
    try:
        return asyncio.run(restore(settings, archive, progress=progress))
    except OSError as error:
        raise InnkeeperError(f"{error.filename or archive}: {error.strerror or error}") from error
