"""The state of a microVM, its memory above all, out of one QEMU and into another: what QEMU calls a migration.

It leaves through a pipe: a QEMU that a guest has taken over never holds a file open that others trust, and writes no more than is taken from it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from innkeeper.host.drivers.qmp import Qmp, QmpError, QmpLostError
from innkeeper.host.linux.pipe_file import PipeFile

STATE = "state"
POLL_SECONDS = 0.005
# Whole memories are read and written.
LOAD_SECONDS = SAVE_SECONDS = 300.0
# The guest runs on while its memory is written, and what it changes meanwhile is written again. One that changes it faster than that is stopped after
# this, or after its memory was written one and a half times.
RUNNING_SECONDS = 20.0
# QEMU stops the guest when it believes that the rest takes no longer.
DOWNTIME_LIMIT_MS = 60
# Nothing but the reader holds it back: 0 is "no limit" only in newer versions.
BANDWIDTH = 1 << 40
# Beside its memory: of its devices.
DEVICES_BYTES = 64 << 20
CANCEL_SECONDS = 10.0
_UNDER_WAY = frozenset({"setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug"})


class StateFailedError(QmpError):
    """The state of the virtual machine could not be moved."""


async def load_state(session: Qmp, path: Path, *, capabilities: Sequence[str] = ()) -> None:
    """Have a QEMU that is `incoming` take the state in a file; it stands still then. Raises QmpError."""
    await _switch(session, capabilities, on=True)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise StateFailedError(f"The state cannot be read: {error.strerror}") from error
    try:
        await session.hand_over(STATE, descriptor)
    finally:
        os.close(descriptor)
    await session.execute("migrate-incoming", {"uri": f"fd:{STATE}"})
    try:
        async with asyncio.timeout(LOAD_SECONDS):
            while (status := await _status(session)) in _UNDER_WAY:
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise QmpLostError("QEMU did not take the state in time") from None
    if status != "completed":
        raise StateFailedError(f"QEMU did not take the state: {status}")
    await _switch(session, capabilities, on=False)


async def save_state(session: Qmp, path: Path, *, memory_bytes: int, capabilities: Sequence[str] = ()) -> None:
    """Write the state of a guest, running or not, into a new file; from a moment close to the end on it stands still.

    Raises StateFailedError, QmpError, OSError. Whatever comes of it, `go_on` is due.
    """
    await _switch(session, capabilities, on=True)
    limits = {"max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME_LIMIT_MS}
    await session.execute("migrate-set-parameters", limits)
    file = PipeFile(path, limit_bytes=memory_bytes * 5 // 2 + DEVICES_BYTES)
    async with file.writing() as into:
        await session.hand_over(STATE, into.fileno())
        into.close()
        await session.execute("migrate", {"uri": f"fd:{STATE}"})
        status = await _sent(session, file, memory_bytes=memory_bytes)
        if status != "completed":
            raise StateFailedError(f"QEMU did not write the state: {status}")


async def _sent(session: Qmp, file: PipeFile, *, memory_bytes: int) -> str:
    """The status in which the migration ended. The guest stands still from the time on when it was not done yet though it should have been."""
    loop = asyncio.get_running_loop()
    began, stopped = loop.time(), False
    try:
        async with asyncio.timeout(SAVE_SECONDS):
            while (status := await _status(session)) in _UNDER_WAY:
                late = loop.time() - began > RUNNING_SECONDS or file.taken > memory_bytes * 3 // 2
                if late and not stopped:
                    await session.execute("stop")
                    stopped = True
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise StateFailedError("QEMU did not write the state in time") from None
    return status


async def go_on(session: Qmp) -> None:
    """Let a guest go on that stands still, whatever it stands still for: a migration under way is given up. Raises QmpError where it does not."""
    if await _status(session) in _UNDER_WAY:
        await session.execute("migrate_cancel")
        await _cancelled(session)
    if not await runs(session):
        await session.execute("cont")
        if not await runs(session):
            raise QmpError("The virtual machine does not go on")


async def _cancelled(session: Qmp) -> None:
    try:
        async with asyncio.timeout(CANCEL_SECONDS):
            while await _status(session) in _UNDER_WAY:
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise QmpLostError("QEMU did not give up in time") from None


async def runs(session: Qmp) -> bool:
    """Whether the guest's processors run. Raises QmpError."""
    answer = await session.execute("query-status")
    return isinstance(answer, dict) and answer.get("running") is True


async def _switch(session: Qmp, capabilities: Sequence[str], *, on: bool) -> None:
    if capabilities:
        wanted = [{"capability": name, "state": on} for name in capabilities]
        await session.execute("migrate-set-capabilities", {"capabilities": wanted})


async def _status(session: Qmp) -> str:
    answer = await session.execute("query-migrate")
    status = answer.get("status", "none") if isinstance(answer, dict) else None
    if not isinstance(status, str):
        raise QmpError("QEMU does not say how far it is")
    return status[:32]
