"""The memory of microVMs that others are clones of: of one that is being made, and, sealed, of those that clones are started of."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from innkeeper.host.completion import to_its_end
from innkeeper.host.linux.sealed_memory import new_memory, seal
from innkeeper.host.linux.sparse import copy_sparse

RAM = "ram"


class TemplateMemories:
    """Memory as descriptors that QEMUs inherit. It is the daemon's own: the next one makes it again, and clones that run keep what they have mapped."""

    def __init__(self) -> None:
        self._becoming: dict[str, int] = {}
        self._sealed: dict[Path, asyncio.Task[int]] = {}

    def begin(self, machine_id: str, size_bytes: int) -> int:
        """Memory for a machine that is to become a template: its QEMU shares it with us. Until `end`. Raises OSError."""
        self._becoming[machine_id] = descriptor = new_memory(size_bytes)
        return descriptor

    async def keep(self, machine_id: str, folder: Path) -> None:
        """Write the memory of such a machine, which stands still, into a folder. Raises OSError."""
        await to_its_end(asyncio.to_thread(_write, self._becoming[machine_id], folder / RAM))

    def end(self, machine_id: str) -> None:
        """Let go of it; harmless where there is none."""
        descriptor = self._becoming.pop(machine_id, None)
        if descriptor is not None:
            os.close(descriptor)

    async def of(self, folder: Path) -> int:
        """The memory in a folder, to be mapped privately; read once, 0.1 s for 128 MB, and then held until `forget`. Raises OSError."""
        reading = self._sealed.get(folder)
        if reading is None:
            reading = asyncio.get_running_loop().create_task(asyncio.to_thread(_read, folder / RAM))
            self._sealed[folder] = reading
        try:
            return await asyncio.shield(reading)
        except OSError:
            self._sealed.pop(folder, None)
            raise

    def forget(self, folder: Path) -> None:
        """Hold it no longer; it goes with the last clone that has it mapped."""
        reading = self._sealed.pop(folder, None)
        if reading is not None:
            reading.add_done_callback(_close)

    def held_bytes(self) -> int:
        """What all of it may come to take: clones make pages in it by writing where it has none, sealed as it is."""
        sealed = [reading.result() for reading in self._sealed.values() if _succeeded(reading)]
        return sum(os.fstat(descriptor).st_size for descriptor in (*self._becoming.values(), *sealed))

    def close(self) -> None:
        """Let go of everything."""
        for machine_id in list(self._becoming):
            self.end(machine_id)
        for folder in list(self._sealed):
            self.forget(folder)


def _succeeded(reading: asyncio.Task[int]) -> bool:
    return reading.done() and not reading.cancelled() and reading.exception() is None


def _close(reading: asyncio.Task[int]) -> None:
    if _succeeded(reading):
        os.close(reading.result())


def _write(memory: int, path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, os.fstat(memory).st_size)
        copy_sparse(memory, file)
    finally:
        os.close(file)


def _read(path: Path) -> int:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        memory = new_memory(os.fstat(file).st_size)
        try:
            copy_sparse(file, memory)
            # From here on no QEMU, taken over by its guest or not, can change what the others see.
            seal(memory)
        except BaseException:
            os.close(memory)
            raise
        return memory
    finally:
        os.close(file)
