"""Sandboxes held still and saved: `runsc pause`, `checkpoint`, `resume`, and what saved memory depends on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import structlog

from innkeeper.errors import CheckpointFailedError
from innkeeper.host.drivers.contract import AGENT_DIRECTORY
from innkeeper.host.drivers.memory_needs import ProgramVersion, cpu_digest
from innkeeper.host.linux import command

log = structlog.stdlib.get_logger(__name__)

# Each asks the sentry over its control socket; a sandbox that does not answer in that time has lost its sentry.
ASK_SECONDS = 30.0
# Writes all of the guest's memory.
SAVE_SECONDS = 300.0
# Of a report of runsc's, the stacks of its goroutines included.
REPORT_BYTES = 65_536
HOST_SOCKET = "A program of the guest holds a connection to the host's link open"
# What runsc says where something cannot be saved, anywhere in its report, and what that means to whoever owns the guest.
REASONS = (
    ("no space left on device", "The host's disk is full"),
    ("HostConnectedEndpoint", HOST_SOCKET),
    ("SCMConnectedEndpoint", HOST_SOCKET),
    ("bound host socket", HOST_SOCKET),
    ("deleted and invalidated dentries", "A program of the guest has a file open that was deleted"),
    ("SaveRejection", "A program of the guest has a connection open that cannot be saved"),
)
DELETED_FILE = re.compile(r'gofer\.dentry\("([^"\\]{1,200})"\)\.beforeSave: deleted')


class SandboxCheckpoints:
    """The verbs, for sandboxes of one `--root`. `flags` are those that every verb of runsc gets."""

    def __init__(self, runsc: str, flags: Sequence[str]) -> None:
        self._runsc = runsc
        self._flags = tuple(flags)
        self._version = ProgramVersion(runsc, self._ask_version)
        self._cpu = cpu_digest()

    async def pause(self, machine_id: str) -> None:
        """Stop every task of the guest; harmless where they stand still. Raises CheckpointFailedError."""
        await self._ask(["pause"], machine_id, already="in state paused")

    async def resume(self, machine_id: str) -> None:
        """Let them go on; harmless where they do. Raises CheckpointFailedError."""
        await self._ask(["resume"], machine_id, already="in state running")

    async def save(self, machine_id: str, folder: Path) -> None:
        """Write the sandbox's memory into a folder, uncompressed: five times as fast, and the guest stands still meanwhile. Raises CheckpointFailedError."""
        options = [f"-image-path={folder}", "-leave-running", "-compression=none"]
        await self._ask(["checkpoint", *options], machine_id, seconds=SAVE_SECONDS)

    async def rename(self, machine_id: str, hostname: str) -> None:
        """Set the host name, which no process of the guest may. Raises CheckpointFailedError."""
        program = [f"{AGENT_DIRECTORY}/inn-agent", "hostname", hostname]
        await self._ask(["exec", "-cap=CAP_SYS_ADMIN", "-user=0:0", "-cwd=/"], machine_id, *program)

    async def needs(self, platform: str) -> dict[str, str]:
        """See Checkpointing."""
        # The state directory says nothing about memory.
        flags = [flag for flag in self._flags if not flag.startswith("--root=")]
        return {
            "runsc": await self._version.text(),
            "platform": platform,
            "flags": " ".join(flags),
            "cpu": self._cpu,
        }

    async def _ask_version(self) -> str:
        answer = await command.run([self._runsc, "--version"])
        return answer.stdout.decode(errors="replace").partition("\n")[0].strip()

    async def _ask(
        self, verb: list[str], machine_id: str, *more: str, seconds: float = ASK_SECONDS, already: str | None = None
    ) -> None:
        """Run a verb. `already` is what runsc says where nothing was left to do."""
        try:
            answer = await command.run(
                [self._runsc, *self._flags, *verb, machine_id, *more], timeout_seconds=seconds, check=False, cwd="/"
            )
        except command.CommandTimedOut:
            raise CheckpointFailedError(f"The sandbox did not answer runsc {verb[0]} in {seconds:g} s") from None
        except command.CommandFailed as error:
            raise CheckpointFailedError("runsc could not be started") from error
        if answer.returncode != 0:
            said = answer.stderr[:REPORT_BYTES].decode(errors="replace")
            if already is not None and said.strip().endswith(already):
                return
            status = command.describe_status(answer.returncode)
            log.warning("runsc refused", verb=verb[0], machine=machine_id, status=status, said=said.partition("\n")[0])
            raise CheckpointFailedError(reason_of(said) or f"The sandbox could not be saved: runsc {verb[0]}: {status}")


def reason_of(said: str) -> str | None:
    """What an error of runsc's means to whoever owns the guest, or None. Names in it are the guest's."""
    reason = next((reason for mark, reason in REASONS if mark in said), None)
    deleted = DELETED_FILE.search(said)
    return f"{reason}: /{deleted[1]}" if reason is not None and deleted is not None else reason
