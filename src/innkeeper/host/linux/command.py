"""The one door to subprocesses: explicit environment, deadline, log line, typed failure."""

import asyncio
import contextlib
import errno
import os
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

import structlog

from innkeeper.errors import InnkeeperError

log = structlog.stdlib.get_logger(__name__)

MINIMAL_ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
STDERR_TAIL_BYTES = 4096
EXIT_GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished command left: exit status (negative: killed by that signal) and its whole output."""

    returncode: int
    stdout: bytes
    stderr: bytes


class CommandFailed(InnkeeperError):  # noqa: N818 - reads as the event it is
    """A command could not be started, or ended with a status other than 0.

    `returncode` is None when the command never ran to an end; `stderr_tail` holds at most STDERR_TAIL_BYTES.
    """

    code = "command_failed"

    def __init__(self, argv: Sequence[str], reason: str, *, returncode: int | None = None, stderr: bytes = b"") -> None:
        self.argv = tuple(argv)
        self.reason = reason
        self.returncode = returncode
        self.stderr_tail = stderr[-STDERR_TAIL_BYTES:].decode(errors="replace").strip()
        message = f"{shlex.join(argv)}: {reason}"
        super().__init__(f"{message}: {self.stderr_tail}" if self.stderr_tail else message)

    @property
    def message(self) -> str:
        """What a user may read: the command line and its output are for the log."""
        full = os.strerror(errno.ENOSPC) in self.stderr_tail
        return "A command on the host failed: its disk is full." if full else "A command on the host failed."


class CommandTimedOut(CommandFailed):
    """A command was killed because it overran its deadline."""

    code = "command_timed_out"


class HasReturncode(Protocol):
    """A child whose owner waits for it; `returncode` stays None until the owner has collected it."""

    @property
    def returncode(self) -> int | None:
        """None while nobody has collected the exit status."""


class OwnChildren:
    """The children that somebody in this process waits for, so that the orphan reaper leaves their status alone.

    A process has exactly one set of children; that is why `own_children` below is the only one of its kind.
    """

    def __init__(self) -> None:
        self._by_pid: dict[int, HasReturncode] = {}
        self._spawning = 0

    def __contains__(self, pid: int) -> bool:
        child = self._by_pid.get(pid)
        return child is not None and child.returncode is None

    def add(self, pid: int, child: HasReturncode) -> None:
        """Keep the reaper away from `pid` until its owner has collected the status."""
        self._by_pid = {known: other for known, other in self._by_pid.items() if other.returncode is None}
        self._by_pid[pid] = child

    @property
    def spawning(self) -> bool:
        """Whether a child may exist whose pid is not known here yet."""
        return self._spawning > 0

    @contextlib.contextmanager
    def being_spawned(self) -> Iterator[None]:
        """Hold the reaper off from before the spawn until `add`."""
        self._spawning += 1
        try:
            yield
        finally:
            self._spawning -= 1


own_children = OwnChildren()


async def run(
    argv: Sequence[str],
    *,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 30,
    check: bool = True,
    cwd: str | os.PathLike[str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a command to its end and return its status and output.

    `env` replaces MINIMAL_ENVIRONMENT (nothing is inherited). The command leads a session of its own, which is killed
    as a whole on timeout and on cancellation. It ends when its output does: a child that keeps stdout open holds the
    answer back. Raises CommandFailed when it cannot start or, with `check`, when its status is not 0;
    CommandTimedOut after `timeout_seconds`.
    """
    process = await spawn(
        argv,
        stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
        cwd=cwd,
        pass_fds=pass_fds,
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            stdout, stderr = await process.communicate(stdin)
    except TimeoutError:
        await end(process)
        raise CommandTimedOut(argv, f"no end within {timeout_seconds:g} s") from None
    except BaseException:
        await asyncio.shield(end(process))
        raise
    returncode = await process.wait()
    if check and returncode != 0:
        raise CommandFailed(argv, describe_status(returncode), returncode=returncode, stderr=stderr)
    return Completed(returncode, stdout, stderr)


async def spawn(
    argv: Sequence[str],
    *,
    stdin: int | IO[Any] = asyncio.subprocess.DEVNULL,
    stdout: int | IO[Any] = asyncio.subprocess.DEVNULL,
    stderr: int | IO[Any] = asyncio.subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    pass_fds: Sequence[int] = (),
) -> asyncio.subprocess.Process:
    """Start a long-lived command that leads its own session, and return it; the caller ends it with `end()`.

    Raises CommandFailed when it cannot start.
    """
    log.debug("+ " + shlex.join(argv))
    with own_children.being_spawned():
        try:
            # No preexec_fn: only without one does CPython use vfork, which does not copy the daemon's page tables.
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=dict(MINIMAL_ENVIRONMENT if env is None else env),
                cwd=cwd,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        except OSError as error:
            raise CommandFailed(argv, f"cannot start: {error.strerror or error}") from error
        own_children.add(process.pid, process)
    return process


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill a spawned command with its whole session's process group and collect it; harmless when it is gone."""
    if process.returncode is None:
        # The group's id is the pid, and the pid cannot be reused before it is collected.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_GRACE_SECONDS):
                await process.wait()


def describe_status(returncode: int) -> str:
    """A sentence for an exit status: `exit status 3`, `killed by SIGKILL`."""
    if returncode >= 0:
        hint = " (command not found)" if returncode == 127 else ""
        return f"exit status {returncode}{hint}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
