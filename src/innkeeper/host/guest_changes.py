"""The changes of machines whose files only their guests see: the agent scans, and what it says is a guest's word, checked before it is kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from innkeeper.errors import ConflictError, FileMissingError, GuestError, InnkeeperError, LinkLostError
from innkeeper.host.change_result import ChangeSet, FileChange, check_result, read_changes
from innkeeper.host.change_scanner import ChangeScanError
from innkeeper.host.change_source import excluded
from innkeeper.host.guest_link import GuestInputError
from innkeeper.host.guest_program import checked_count
from innkeeper.host.machine import Machine
from innkeeper.wire.stream import Data

DEADLINE_SECONDS = 60.0
# A link that breaks costs no report: asked again by the same name, the agent answers the same.
ATTEMPTS = 2
MAX_RESULT_BYTES = 32 * 1_048_576
NOTHING = ChangeSet(total=0, rows=(), scanned_entries=0, duration_us=0)
# What an agent's errors mean to whoever asked for a scan.
CODES = {FileMissingError.code: "no_baseline", ConflictError.code: "no_space"}


class GuestChanges:
    """A source that is the agent in the guest. The baseline lies on the guest's own disk; the host's file says that it is there."""

    def __init__(self) -> None:
        # By machine: how often its disk had been written to before the last scan. As often again, a scan would find nothing.
        self._clean: dict[str, int] = {}
        self.saved = 0

    def watch(self, machine: Machine) -> None:
        """See ChangeSource: a guest counts by itself, from its first scan on."""

    def release(self, machine: Machine) -> None:
        """See ChangeSource."""
        self._clean.pop(machine.id, None)

    async def take_baseline(self, machine: Machine, baseline: Path) -> None:
        """See ChangeSource."""
        self._note(machine, await _ask(machine, {"op": "baseline"}))
        _mark(baseline)

    async def changes(
        self, machine: Machine, baseline: Path, *, result: Path, limit: int, writes: int | None
    ) -> ChangeSet:
        """See ChangeSource."""
        if writes is not None and self._clean.get(machine.id) == writes:
            self.saved += 1
            return NOTHING
        answer = await _ask(machine, {"op": "changes", "id": result.stem}, result)
        self._note(machine, answer)
        total = checked_count(answer, "total")
        rows: tuple[FileChange, ...] = ()
        if total:
            rows = tuple((await asyncio.to_thread(read_changes, result, 0, limit))[0])
        return ChangeSet(
            total=total or 0,
            rows=rows,
            scanned_entries=checked_count(answer, "scanned") or 0,
            duration_us=checked_count(answer, "duration_us") or 0,
        )

    def _note(self, machine: Machine, answer: Mapping[str, Any]) -> None:
        writes = checked_count(answer, "writes")
        if writes is None:
            self._clean.pop(machine.id, None)
        else:
            self._clean[machine.id] = writes


async def _ask(machine: Machine, wanted: Mapping[str, Any], result: Path | None = None) -> dict[str, Any]:
    """The agent's answer; the rows that it sends are in `result` then, checked. Raises ChangeScanError, whatever went wrong: the command was carried out."""
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            for _ in range(ATTEMPTS - 1):
                with contextlib.suppress(LinkLostError):
                    return await _answer(machine, wanted, result)
            return await _answer(machine, wanted, result)
    except TimeoutError:
        raise ChangeScanError("timeout", f"a scan took over {DEADLINE_SECONDS} s") from None
    except GuestInputError as error:
        raise ChangeScanError("too_large" if error.guest_code == "too_large" else "io_error", error.message) from error
    except InnkeeperError as error:
        raise ChangeScanError(CODES.get(error.code, "io_error"), error.message) from error
    except (OSError, ValueError) as error:
        raise ChangeScanError("io_error", f"a result cannot be kept: {error}") from error


async def _answer(machine: Machine, wanted: Mapping[str, Any], result: Path | None) -> dict[str, Any]:
    stream = await machine.endpoint.open(
        "changes", {**wanted, "excluded": list(excluded(machine))}, timeout_seconds=DEADLINE_SECONDS
    )
    with contextlib.ExitStack() as opened:
        opened.callback(stream.cancel)
        file: BinaryIO | None = None
        size = 0
        while (event := await stream.next_event()) is not None:
            if result is None or not isinstance(event, Data):
                raise GuestError("The guest agent sent more than was asked for")
            size += len(event.data)
            if size > MAX_RESULT_BYTES:
                raise ChangeScanError("too_large", f"over {MAX_RESULT_BYTES} bytes of changes")
            if file is None:
                file = opened.enter_context(_incoming(result))
            file.write(event.data)
        answer = await stream.result()
        if result is not None:
            total = 0
            if file is not None:
                file.flush()
                total = await asyncio.to_thread(check_result, Path(file.name))
            if checked_count(answer, "total") != total:
                raise GuestError(f"The guest agent told of other changes than the {total} that it listed")
            if file is not None:
                _keep(file, result)
    return answer


@contextlib.contextmanager
def _incoming(result: Path) -> Iterator[BinaryIO]:
    """A file beside the result, gone at the end unless it was renamed. The folder is not ours alone: nothing that lies there is written through."""
    path = result.with_name("incoming")
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with open(path, "wb", opener=lambda name, _: os.open(name, flags, 0o600)) as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _keep(file: BinaryIO, result: Path) -> None:
    Path(file.name).rename(result)


def _mark(baseline: Path) -> None:
    baseline.unlink(missing_ok=True)
    os.close(os.open(baseline, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
