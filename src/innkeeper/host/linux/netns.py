"""Named network namespaces, as `ip netns` keeps them, and running functions and commands inside them.

They live in /run/netns because that survives the daemon and because an operator's `ip netns exec` then works.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from innkeeper.host.linux import command
from innkeeper.host.linux.mounts import CLONE_NEWNET, MNT_DETACH, setns, umount2

NETNS_DIRECTORY = Path("/run/netns")

T = TypeVar("T")


def path_of(name: str) -> Path:
    """Where the namespace `name` is kept; an absolute path stands for itself."""
    return NETNS_DIRECTORY / name


def exists(name: str) -> bool:
    """Whether there is a namespace of that name."""
    return path_of(name).exists()


def names(prefix: str = "") -> list[str]:
    """The names of all namespaces that start with `prefix`."""
    try:
        return sorted(name for name in os.listdir(NETNS_DIRECTORY) if name.startswith(prefix))  # noqa: PTH208
    except FileNotFoundError:
        return []


async def ip_batch(lines: Iterable[str], *, inside: str | None = None, force: bool = False) -> command.Completed:
    """Run several `ip` commands in one process, in the namespace `inside` (None: in ours).

    Stops at the first that fails, unless `force`; raises CommandFailed when one did, unless `force`.
    """
    argv = ["ip", *(["-force"] if force else []), "-batch", "-"]
    text = "".join(line + "\n" for line in lines)
    return await run_inside(inside, argv, stdin=text.encode(), check=not force)


async def run_inside(
    name: str | None,
    argv: Sequence[str],
    *,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 30,
    check: bool = True,
) -> command.Completed:
    """`command.run` in the namespace `name` (None: in ours)."""
    # nsenter rather than `ip -n`, which also makes a mount namespace and mounts a sysfs in it.
    inside = [] if name is None else ["nsenter", f"--net={path_of(name)}", "--"]
    return await command.run([*inside, *argv], stdin=stdin, env=env, timeout_seconds=timeout_seconds, check=check)


def call_inside(name: str | None, function: Callable[[], T]) -> T:
    """Run `function` in a thread of its own inside the namespace `name` (None: here), and return its result.

    Sockets stay in the namespace where they were made; /proc/sys/net shows the namespace of the thread that opens it.
    """
    if name is None:
        return function()
    results: list[T] = []
    errors: list[BaseException] = []

    def inside() -> None:
        try:
            fd = os.open(path_of(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(fd, CLONE_NEWNET)
            finally:
                os.close(fd)
            results.append(function())
        except BaseException as error:
            errors.append(error)

    # A new thread, not one of a pool: it ends here and takes its foreign namespace with it.
    thread = threading.Thread(target=inside, name=f"netns {name}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


async def delete(name: str) -> None:
    """Remove the namespace `name`, with every interface in it once no process is left inside; harmless when gone."""
    await asyncio.to_thread(_delete, path_of(name))


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        # EINVAL: a namespace that was bound elsewhere, or a file left by a crash between its two steps.
        umount2(path, MNT_DETACH)
    path.unlink(missing_ok=True)


def write_sysctls(name: str | None, values: Mapping[str, str], *, ignore_missing: bool = False) -> None:
    """Write `net/...` settings (slashes, below /proc/sys) in the namespace `name`. Raises OSError."""

    def write() -> None:
        for key, value in values.items():
            try:
                Path("/proc/sys", key).write_text(value)
            except FileNotFoundError:
                if not ignore_missing:
                    raise

    call_inside(name, write)


def read_sysctl(name: str | None, key: str) -> str:
    """One `net/...` setting in the namespace `name`."""
    return call_inside(name, lambda: Path("/proc/sys", key).read_text().strip())
