"""What a guest says of itself, by a script that every image with a shell can run: who it is, its time, some of its randomness, what was left in it."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from innkeeper.bus.contract import Data
from innkeeper.core.host_verbs import Execute, to_wire
from innkeeper.ids import uuid7

if TYPE_CHECKING:
    from innkeeper.control.context import Control

PROBE_SECONDS = 30.0
OUTPUT_BYTES_MAX = 4_096
STDERR = 2
# In memory in guests of every driver, and part of what is saved of it.
NONCE_PATH = "/dev/shm/.innkeeper-snapshot"  # noqa: S108 - of the guest, not of this machine
# Whoever has made the file a link, or a directory, is not followed: what cannot be left there is not found later.
_LEAVE = """umask 077; rm -f "$1"; (set -C; printf %s "$2" > "$1")\n"""
_TELL = """printf 'time='; date +%s; printf 'hostname='; cat /etc/hostname; printf 'machine_id='; cat /etc/machine-id
printf 'entropy='; od -An -v -tx1 -N16 /dev/urandom | tr -d ' \\n'; echo; printf 'nonce='; [ -L "$1" ] || head -c 64 "$1"; echo\n"""
_VALUE = re.compile(r"[A-Za-z0-9._-]{0,80}")


@dataclass(frozen=True, slots=True)
class Told:
    """What a guest said; what it did not say is empty. Everything is a guest's word. `time` is in Unix seconds."""

    time: int | None
    hostname: str
    machine_id: str
    entropy: str
    nonce: str


async def probe(control: Control, host_id: UUID, instance_id: UUID, *, leave: str | None = None) -> Told:
    """Ask a ready guest; with `leave` that nonce is left in its memory before. Raises InnkeeperError, TimeoutError where it does not answer."""
    verb = Execute(
        instance_id=instance_id,
        execution_id=uuid7(),
        command="",
        timeout_seconds=PROBE_SECONDS,
        answer_bytes=OUTPUT_BYTES_MAX,
        argv=("/bin/sh", "-c", (_LEAVE if leave else "") + _TELL, "sh", NONCE_PATH, leave or ""),
        user="root",
        env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        exact_env=True,
        merge=False,
    )
    said = bytearray()
    async with asyncio.timeout(PROBE_SECONDS):
        async with control.bus.open(host_id, Execute.verb, to_wire(verb)) as call:
            async for event in call.events():
                if isinstance(event, Data) and event.channel != STDERR and len(said) < OUTPUT_BYTES_MAX:
                    said += event.data
            await call.result()
    return told_of(bytes(said))


def told_of(said: bytes) -> Told:
    """What a probe said, as far as it is well-formed. Pure."""
    found: dict[str, str] = {}
    for line in said.decode("ascii", "replace").splitlines():
        name, _, value = line.partition("=")
        if _VALUE.fullmatch(value):
            found.setdefault(name, value)
    time = found.get("time", "")
    return Told(
        time=int(time) if time.isdigit() and len(time) < 15 else None,
        hostname=found.get("hostname", ""),
        machine_id=found.get("machine_id", ""),
        entropy=found.get("entropy", ""),
        nonce=found.get("nonce", ""),
    )
