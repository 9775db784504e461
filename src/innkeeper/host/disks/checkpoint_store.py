"""Checkpoints as folders: a disk, perhaps the memory that goes with it, and a manifest that says what they are. Whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from innkeeper.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    ConflictError,
    MemoryUnusableError,
    UnavailableError,
)
from innkeeper.host.disks.sparse_digest import sparse_digest
from innkeeper.host.linux.extents import own_bytes
from innkeeper.host.linux.hold import held_folder

# See `machine.FORMAT`: the same rules.
FORMAT = 1
MANIFEST = "manifest.json"
DISK = "disk.img"
MEMORY = "memory"
AGENT = "inn-agent"
DRAFT = ".draft-"
READ_BYTES = 1 << 20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class SavedMemory:
    """Memory beside a disk: of a machine of these sizes; `needs` must be the same where it is restored; `files` are name -> (bytes, SHA-256).

    One without checksums yet names the `boot` of the host in which it was saved: until that ends, what is read is what was written.
    """

    driver: str
    agent: str
    vcpu_count: int
    memory_mb: int
    needs: dict[str, str]
    files: dict[str, tuple[int, str]]
    boot: str = ""

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One moment of an instance. `disk_bytes` is what its disk takes, blocks that it shares with others included."""

    id: UUID
    instance_id: UUID
    created_at: float
    image_digest: str
    disk_mb: int
    disk_bytes: int
    folder: Path = field(compare=False)
    memory: SavedMemory | None = None

    @property
    def disk(self) -> Path:
        """The disk's image, which nobody may mount or write: machines get copies."""
        return self.folder / DISK

    @property
    def memory_folder(self) -> Path:
        """Where its memory is, if it has any."""
        return self.folder / MEMORY

    def check_memory(self, *, driver: str, needs: dict[str, str], agents: Path) -> SavedMemory:
        """Its memory, if it can be restored here: by that driver, with these needs and one of the agents in a folder; whether it is whole is not looked at.

        Raises MemoryUnusableError with the reason.
        """
        memory = self.memory
        if memory is None:
            raise MemoryUnusableError("The checkpoint holds no memory, only a disk")
        if memory.driver != driver:
            raise MemoryUnusableError(f"The memory was saved by the driver {memory.driver}; this host has {driver}")
        for name in sorted(memory.needs.keys() | needs.keys()):
            if memory.needs.get(name) != needs.get(name):
                # The values are the host's own business.
                raise MemoryUnusableError(f"The memory was saved with another {name} than this host has now")
        if not (agents / memory.agent / AGENT).exists():
            raise MemoryUnusableError("The agent that the memory was saved with is not on this host any more")
        if memory.boot not in ("", boot_id()):
            raise MemoryUnusableError("The host went down just after the memory was saved")
        return memory

    def check_whole(self) -> None:
        """Return if its memory is what was saved. Takes a second for a gigabyte: call it in a thread.

        Raises CheckpointDamagedError.
        """
        files = {} if self.memory is None else self.memory.files
        try:
            found = {
                name: digest_of(self.memory_folder / name) if digest else (size_of(self.memory_folder / name), "")
                for name, (_, digest) in files.items()
            }
        except OSError:
            raise CheckpointDamagedError("The saved memory cannot be read") from None
        if found != files:
            raise CheckpointDamagedError("The saved memory is damaged")

    def disk_digest(self) -> str:
        """The checksum of its disk as it is now. Raises CheckpointDamagedError where it cannot be read. Takes seconds for a gigabyte: call it in a thread."""
        try:
            return sparse_digest(self.disk)
        except OSError as error:
            raise CheckpointDamagedError("The saved disk cannot be read") from error


class CheckpointStore:
    """The checkpoints below `directory`, which shares a file system with the disks: copies of disks do not go further."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # How often each is being read: it must not go under whoever starts a machine from it.
        self._read: Counter[UUID] = Counter()
        # Whoever adds to one that was published must know that it is there still.
        self._naming = threading.Lock()
        directory.mkdir(mode=0o700, exist_ok=True)

    def draft(self) -> contextlib.AbstractContextManager[Path]:
        """A private folder for a checkpoint that is being made, gone at the end unless it was published. One of a daemon that was killed is nobody's."""
        return held_folder(self._directory, DRAFT)

    def publish(self, draft: Path, checkpoint: Checkpoint, *, durable: bool = True) -> Checkpoint:
        """Make a draft the checkpoint. It is on the disk then, and there after a loss of power. Raises ConflictError for a taken id, OSError.

        One that is not `durable` is there after `kill -9`; after a loss of power it may be damaged, which its checksums tell.
        """
        target = self._directory / str(checkpoint.id)
        write_manifest(draft, checkpoint)
        for path in (*(draft / MEMORY).glob("*"), draft / DISK, draft / MEMORY, draft) if durable else ():
            if path.exists():
                sync(path)
        try:
            draft.rename(target)
        except OSError as error:
            if target.exists():
                raise ConflictError("There is a checkpoint of that id already") from error
            raise
        if durable:
            sync(self._directory)
        return load(target)

    def get(self, checkpoint_id: UUID) -> Checkpoint:
        """One. Raises CheckpointNotFoundError."""
        return load(self._directory / str(checkpoint_id))

    def all(self) -> list[Checkpoint]:
        """Those that can be read, oldest first."""
        found = []
        for entry in self._directory.iterdir():
            # A draft has a manifest just before it is published.
            if entry.name.startswith(DRAFT):
                continue
            with contextlib.suppress(CheckpointNotFoundError):
                found.append(load(entry))
        return sorted(found, key=lambda one: (one.created_at, one.id))

    @contextlib.contextmanager
    def reading(self, checkpoint_id: UUID) -> Iterator[Checkpoint]:
        """One that stays for the block. Raises CheckpointNotFoundError."""
        checkpoint = self.get(checkpoint_id)
        self._read[checkpoint_id] += 1
        try:
            yield checkpoint
        finally:
            self._read[checkpoint_id] -= 1
            self._read = +self._read

    def drop(self, checkpoint_id: UUID) -> bool:
        """Remove one; False when there is none. Raises ConflictError while a machine is started from it. Call it in a thread: files of gigabytes go."""
        if self._read[checkpoint_id]:
            raise ConflictError("The checkpoint is being restored")
        # Out of sight in one step; what a crash leaves of it is half-made to the next start.
        doomed = self._directory / f"{DRAFT}{secrets.token_hex(8)}"
        try:
            with self._naming:
                (self._directory / str(checkpoint_id)).rename(doomed)
        except FileNotFoundError:
            return False
        shutil.rmtree(doomed, ignore_errors=True)
        return True

    def seal(self, checkpoint_id: UUID) -> bool:
        """Add the checksums of memory that was published without; False where there is nothing to be added. Takes a second for a gigabyte: call it in a thread.

        Raises OSError.
        """
        path = self._directory / str(checkpoint_id)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            # By its descriptor: the name may be another one's by the time that all is read.
            checkpoint = load(Path(f"/proc/self/fd/{descriptor}"))
            memory = checkpoint.memory
            if memory is None or memory.boot != boot_id():
                return False
            sealed = replace(memory, files=saved_files(checkpoint.memory_folder), boot="")
            with self._naming:
                if not os.path.samestat(os.fstat(descriptor), path.lstat()):
                    return False
                write_manifest(checkpoint.folder, replace(checkpoint, memory=sealed))
            return True
        except (CheckpointNotFoundError, FileNotFoundError):
            # It was dropped meanwhile.
            return False
        finally:
            os.close(descriptor)

    def own_bytes(self, checkpoint_ids: Iterable[UUID]) -> dict[UUID, int]:
        """What would be free without each; one that there is not has no entry."""
        sizes = {}
        for checkpoint_id in checkpoint_ids:
            folder = self._directory / str(checkpoint_id)
            with contextlib.suppress(FileNotFoundError):
                sizes[checkpoint_id] = sum(own_bytes(path) for path in (folder / DISK, *(folder / MEMORY).glob("*")))
        return sizes

    def folders(self) -> list[Path]:
        """Where they are, those that cannot be read included."""
        return sorted(entry for entry in self._directory.iterdir() if not entry.name.startswith(DRAFT))

    def images(self) -> set[str]:
        """Digests of the images below them. Raises UnavailableError when that is not known of all."""
        digests = set()
        for entry in self._directory.iterdir():
            if entry.name.startswith(DRAFT):
                continue
            try:
                digests.add(load(entry).image_digest)
            except CheckpointNotFoundError as error:
                if entry.exists():
                    raise UnavailableError("A checkpoint cannot be read") from error
        return digests

    def agents(self) -> set[str]:
        """The agents that their memory needs."""
        return {checkpoint.memory.agent for checkpoint in self.all() if checkpoint.memory is not None}


def write_manifest(folder: Path, checkpoint: Checkpoint) -> None:
    """Say in a checkpoint's folder what it is, in one step where it says something already."""
    body = {**asdict(checkpoint), "id": str(checkpoint.id), "instance_id": str(checkpoint.instance_id)}
    del body["folder"]
    draft = folder / f"{MANIFEST}.new"
    draft.write_text(json.dumps({"format": FORMAT, **body}, indent=1))
    sync(draft)
    draft.rename(folder / MANIFEST)


def load(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises CheckpointNotFoundError for what is none, or one of a newer version of the server."""
    try:
        body: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if body["format"] > FORMAT:
            raise CheckpointNotFoundError("The checkpoint is of a newer version of the server")
        memory = body["memory"]
        return Checkpoint(
            id=UUID(body["id"]),
            instance_id=UUID(body["instance_id"]),
            created_at=float(body["created_at"]),
            image_digest=str(body["image_digest"]),
            disk_mb=int(body["disk_mb"]),
            disk_bytes=int(body["disk_bytes"]),
            folder=folder,
            memory=None
            if memory is None
            else SavedMemory(
                driver=str(memory["driver"]),
                agent=str(memory["agent"]),
                vcpu_count=int(memory["vcpu_count"]),
                memory_mb=int(memory["memory_mb"]),
                needs=dict(memory["needs"]),
                files={name: (int(size), str(digest)) for name, (size, digest) in memory["files"].items()},
                boot=str(memory.get("boot", "")),
            ),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointNotFoundError from None


def saved_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> (bytes, SHA-256) of what lies in a folder. Takes a second for a gigabyte: call it in a thread."""
    return {path.name: digest_of(path) for path in sorted(folder.iterdir())}


def written_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> (bytes, "") of what lies in a folder: without checksums."""
    return {path.name: (size_of(path), "") for path in sorted(folder.iterdir())}


def size_of(path: Path) -> int:
    """Bytes of a file. Raises OSError."""
    return path.stat().st_size


def boot_id() -> str:
    """Which start of the host's kernel this is."""
    return BOOT_ID.read_text().strip()


def digest_of(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on its device. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
