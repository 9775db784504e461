"""Runs in a guest, as its user or as root: attacks the agent, PID 1, and its link; prints as JSON what came of each attempt."""

import contextlib
import ctypes
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

LINK = Path("/.innkeeper/link")
BIN = Path("/.innkeeper/bin")
SOCKET = str(LINK / "agent.sock")
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
PIDFD_OPEN, PIDFD_GETFD, PROCESS_VM_READV = 434, 438, 310
libc = ctypes.CDLL(None, use_errno=True)
said: dict[str, str] = {}


def attempt(name: str, action: Callable[[], object]) -> None:
    try:
        said[name] = f"done: {action()!r}"[:120]
    except OSError as error:
        said[name] = error.strerror or type(error).__name__


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def steal_descriptor() -> int:
    with open(checked(libc.syscall(PIDFD_OPEN, 1, 0)), closefd=True) as pidfd:
        return checked(libc.syscall(PIDFD_GETFD, pidfd.fileno(), 7, 0))


def second_link() -> bytes:
    """What a second connection to the socket is told."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(5)
        link.connect(SOCKET)
        with contextlib.suppress(OSError):
            link.sendall(b"\0" * 64)
        try:
            return link.recv(4096)
        except ConnectionError:
            return b""


for name in ("environ", "mem", "maps", "auxv", "io", "stack", "syscall"):
    attempt(f"read {name}", lambda name=name: Path("/proc/1", name).read_bytes()[:8])
attempt("list descriptors", lambda: list(Path("/proc/1/fd").iterdir()))
for number in (3, 7, 8, 9):
    attempt(f"open descriptor {number}", lambda number=number: os.open(f"/proc/1/fd/{number}", os.O_RDWR))
attempt("write memory", lambda: os.open("/proc/1/mem", os.O_RDWR))
if os.getuid() != 0:  # root may, and then stops its own guest
    attempt("attach", lambda: checked(libc.ptrace(PTRACE_ATTACH, 1, None, None)))
    attempt("seize", lambda: checked(libc.ptrace(PTRACE_SEIZE, 1, None, None)))
attempt("steal a descriptor", steal_descriptor)
if os.getuid() != 0:  # root does end PID 1, and its own guest with it
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        attempt(f"send {number.name}", lambda number=number: os.kill(1, number))
attempt("dial", second_link)
for port in Path("/dev").glob("vport*"):
    attempt(f"open the port {port}", lambda port=port: os.open(port, os.O_RDWR))
for folder in (LINK, BIN):
    attempt(f"write {folder}", lambda folder=folder: (folder / "x").write_text("x"))
    attempt(f"make directory {folder}", lambda folder=folder: (folder / "d").mkdir())
    attempt(f"change mode {folder}", lambda folder=folder: folder.chmod(0o777))
    attempt(f"move {folder}", lambda folder=folder: folder.rename("/tmp/moved"))
attempt("remove the socket", Path(SOCKET).unlink)
attempt("replace the socket", lambda: Path("/etc/hostname").rename(SOCKET))
attempt("bind beside the socket", lambda: socket.socket(socket.AF_UNIX).bind(str(LINK / "mine")))
attempt("overwrite the agent", lambda: (BIN / "inn-agent").write_bytes(b"x"))
attempt("link the agent", lambda: os.link(BIN / "inn-agent", "/tmp/agent"))
for place in ("/.innkeeper/link/..", "/.innkeeper/bin/..", "/.innkeeper/link"):
    # A microVM's link is a port.
    said[f"list {place}"] = (
        " ".join(sorted(path.name for path in Path(place).iterdir())) if Path(place).is_dir() else ""
    )
print(json.dumps(said))
