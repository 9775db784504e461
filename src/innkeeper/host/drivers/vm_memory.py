"""The state of a microVM, its memory above all, out of one QEMU and into another: what QEMU calls a migration.

It leaves through a pipe: a QEMU that a guest has taken over never holds a file open that others trust, and writes no more than is taken from it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from innkeeper.host.drivers.qmp import Event, Qmp, QmpError, QmpLostError
from innkeeper.host.linux.pipe_file import PipeFile

STATE = "state"
POLL_SECONDS = 0.005
# Whole memories are read and written.
LOAD_SECONDS = SAVE_SECONDS = 300.0
# The guest runs on while its memory is written, and what it changes meanwhile is written again. One that changes it as fast is stopped after that long,
# or when so many times its memory were written.
RUNNING_SECONDS = 20.0
TIMES_RUNNING = 1.5
# When it begins to write the memory, and when the guest stands still.
READ_AT_BOTH_ENDS = 2
SET_UP_SECONDS = 30.0
# What it has written goes to its disk first.
STOP_SECONDS = 60.0
# QEMU stops the guest when it believes that the rest takes no longer.
DOWNTIME_LIMIT_MS = 60
# Nothing but the reader holds it back: 0 is "no limit" only in newer versions.
BANDWIDTH = 1 << 40
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
            while (status := (await _progress(session)).status) in _UNDER_WAY:
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise QmpLostError("QEMU did not take the state in time") from None
    if status != "completed":
        raise StateFailedError(f"QEMU did not take the state: {status}")
    await _switch(session, capabilities, on=False)


class Stops:
    """Hears what QEMU says unasked while a state is saved, and calls back when the guest stops for the moment that is kept."""

    def __init__(self, on_still: Callable[[], None]) -> None:
        self._on_still = on_still
        self.count = True

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if self.count and event.name == "STOP":
            self._on_still()


async def save_state(
    session: Qmp,
    path: Path,
    *,
    limit_bytes: int,
    log_is_exact: bool = False,
    stops: Stops | None = None,
    capabilities: Sequence[str] = (),
) -> None:
    """Write the state of a guest, running or not, into a new file; from a moment close to the end on it stands still.

    What a running guest changes while it is written is written again. The log of what it changes is exact with KVM. With TCG it is so for as long as nobody
    reads it: QEMU 7.2 then goes on to write past the log to pages that it knows already, and guests that were restored from memory of two passes
    broke. So there the log begins with the guest stopped, is read with the guest stopped, and in between all of the memory is written once.

    Raises StateFailedError, QmpError, OSError: EFBIG where it is larger than `limit_bytes`. Whatever comes of it, `go_on` is due.
    """
    stops = stops or Stops(lambda: None)
    await _switch(session, capabilities, on=True)
    # At 0 QEMU stops the guest after the first pass, whatever is left then.
    limits = {"max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME_LIMIT_MS if log_is_exact else 0}
    await session.execute("migrate-set-parameters", limits)
    live = await runs(session)
    sent = await _write_state(session, path, limit_bytes, log_is_exact, stops)
    if live and not log_is_exact and (sent.times_read > READ_AT_BOTH_ENDS or await runs(session)):
        # Another version of QEMU, which does read it meanwhile.
        path.unlink()  # noqa: ASYNC240 - one unlink(2)
        await go_on(session)
        await session.execute("stop", timeout_seconds=STOP_SECONDS)
        await _write_state(session, path, limit_bytes, log_is_exact, stops)


async def _write_state(session: Qmp, path: Path, limit_bytes: int, log_is_exact: bool, stops: Stops) -> _Progress:
    begin_stopped = not log_is_exact and await runs(session)
    file = PipeFile(path, limit_bytes=limit_bytes)
    async with file.writing() as into:
        await session.hand_over(STATE, into.fileno())
        into.close()
        if begin_stopped:
            stops.count = False
            await session.execute("stop", timeout_seconds=STOP_SECONDS)
        await session.execute("migrate", {"uri": f"fd:{STATE}"})
        if begin_stopped:
            await _set_up(session)
            # Nothing was read of the pipe: there is more to write than it holds, and QEMU cannot be at the end yet.
            stops.count = True
            await session.execute("cont")
        file.begin()
        sent = await _sent(session, file)
        if sent.status != "completed":
            raise StateFailedError(f"QEMU did not write the state: {sent.status}")
    return sent


async def _set_up(session: Qmp) -> None:
    try:
        async with asyncio.timeout(SET_UP_SECONDS):
            while (await _progress(session)).status in ("none", "setup"):
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise QmpLostError("QEMU did not begin to write the state in time") from None


async def _sent(session: Qmp, file: PipeFile) -> _Progress:
    """How the state's way out ended. A guest that makes it too long is stopped meanwhile."""
    loop = asyncio.get_running_loop()
    began, stopped = loop.time(), False
    try:
        async with asyncio.timeout(SAVE_SECONDS):
            while (progress := await _progress(session)).status in _UNDER_WAY:
                too_much = 0 < progress.total_bytes * TIMES_RUNNING < file.taken
                if not stopped and (too_much or loop.time() - began > RUNNING_SECONDS):
                    await session.execute("stop", timeout_seconds=STOP_SECONDS)
                    stopped = True
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise StateFailedError("QEMU did not write the state in time") from None
    return progress


async def go_on(session: Qmp) -> None:
    """Let a guest go on that stands still, whatever it stands still for: a migration under way is given up. Raises QmpError where it does not."""
    if (await _progress(session)).status in _UNDER_WAY:
        await session.execute("migrate_cancel")
        await _cancelled(session)
    if not await runs(session):
        await session.execute("cont")
        if not await runs(session):
            raise QmpError("The virtual machine does not go on")


async def _cancelled(session: Qmp) -> None:
    try:
        async with asyncio.timeout(CANCEL_SECONDS):
            while (await _progress(session)).status in _UNDER_WAY:
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


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far QEMU says that it is with moving its state ("none" where it never did), how large the memory is, and how often it read what had changed."""

    status: str
    total_bytes: int
    times_read: int


async def _progress(session: Qmp) -> _Progress:
    answer = await session.execute("query-migrate")
    status = answer.get("status", "none") if isinstance(answer, dict) else None
    if not isinstance(status, str):
        raise QmpError("QEMU does not say how far it is")
    memory = answer.get("ram")
    numbers = [memory.get(name) if isinstance(memory, dict) else 0 for name in ("total", "dirty-sync-count")]
    total, times = (number if type(number) is int else 0 for number in numbers)
    return _Progress(status[:32], total, times)
