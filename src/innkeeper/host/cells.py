"""What is kept of a cell beside its output: what became of its interpreter, and what it displayed. The guest says it, so nothing of it is believed unseen."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import structlog

from innkeeper.core.cell_results import RESULTS_BYTES_MAX
from innkeeper.errors import GuestError, InnkeeperError
from innkeeper.host.journal import ExecutionRecord
from innkeeper.host.machine import Machine
from innkeeper.wire.stream import Data

log = structlog.stdlib.get_logger(__name__)

FETCH_SECONDS = 10.0


async def keep_cell(machine: Machine, directory: Path, record: ExecutionRecord, cell: dict[str, Any]) -> None:
    """Note in the record what the guest says of a cell that ended, and fetch what it displayed. What cannot be fetched counts as truncated."""
    record.kernel_fresh, record.kernel_lost = cell.get("fresh") is True, cell.get("lost") is True
    record.results_truncated = cell.get("results_truncated") is True
    size = cell.get("result_bytes")
    if type(size) is not int or size <= 0:
        return
    try:
        data = await _fetch(machine, record.execution_id)
        (directory / f"{record.execution_id}.results").write_bytes(data)
        record.result_bytes = len(data)
    except (InnkeeperError, TimeoutError, OSError) as error:
        log.warning("a cell's results are not kept", machine=machine.id, error=str(error))
        record.results_truncated = True


async def _fetch(machine: Machine, execution_id: str) -> bytes:
    data = bytearray()
    async with asyncio.timeout(FETCH_SECONDS):
        stream = await machine.endpoint.open("results", {"id": execution_id})
        try:
            async for event in stream.events():
                if isinstance(event, Data):
                    data += event.data
                    if len(data) > RESULTS_BYTES_MAX:
                        raise GuestError("The guest sent more results than a cell may have")
        finally:
            stream.cancel()
    return bytes(data)


def kernel_of(record: ExecutionRecord) -> dict[str, bool] | None:
    """What became of a cell's interpreter; None for other executions."""
    if record.kernel_fresh is None:
        return None
    return {"fresh": record.kernel_fresh, "lost": record.kernel_lost is True}


def read_results(directory: Path, execution_id: str) -> bytes:
    """What a cell displayed, as `core.cell_results` reads it; nothing where nothing is kept."""
    with contextlib.suppress(FileNotFoundError):
        return (directory / f"{execution_id}.results").read_bytes()
    return b""
