"""Run in a jail of an import in place of skopeo: tries every way out, and says which held. Standard library only.

`probe CANARY ADDRESS:PORT…` prints a line for each attempt, `held NAME: why` or `BROKEN NAME: what it got`; `linger` stays behind by all means.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

X86 = platform.machine() == "x86_64"
# Of asm/unistd_64.h and asm-generic/unistd.h.
CALLS = {
    "ptrace": (101, 117), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "init_module": (175, 105), "kexec_load": (246, 104),
    "reboot": (169, 142), "swapon": (167, 224), "sethostname": (170, 161), "settimeofday": (164, 170), "quotactl": (179, 60), "syslog": (103, 116),
    "personality": (135, 92), "acct": (163, 89), "fsopen": (430, 430), "fsmount": (432, 432), "move_mount": (429, 429), "open_tree": (428, 428),
    "mount_setattr": (442, 442), "fanotify_init": (300, 262), "vhangup": (153, 58),
}  # fmt: skip
CLONE, CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = (56, 220)[not X86], 0x00020000, 0x10000000, 0x40000000
PIECE = 30 << 20
AF_ALG, AF_VSOCK, AF_PACKET = 38, 40, 17
KEPT = 0b11011  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
PROXY = ("127.0.0.1", 3128)
libc = ctypes.CDLL(None, use_errno=True)


class Held(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """An attempt that came to nothing, and why."""


def call(number: int, *arguments: int) -> str:
    """What a system call returned. Raises Held with the name of its error."""
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(one) for one in arguments))
    if result < 0:
        raise Held(errno.errorcode[ctypes.get_errno()])
    return f"returned {result}"


def system_call(name: str) -> str:
    # Traceme for ptrace, a new user namespace for unshare: what would succeed for anybody.
    first = {"unshare": CLONE_NEWUSER, "personality": 0x0040000}.get(name, 0)
    return call(CALLS[name][not X86], first, 0, 0, 0, 0)


def namespace(flag: int) -> str:
    """A child in a namespace of its own, by the call that the filter lets through for children."""
    said = call(CLONE, flag | signal.SIGCHLD, 0, 0, 0, 0)
    if said == "returned 0":
        os._exit(0)
    return said


def other_architecture() -> str:
    """mount(2) by the numbers of 32-bit programs, from code of our own."""
    if not X86:
        raise Held("there is one set of numbers")
    child = os.fork()
    if child == 0:
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(b"\xb8\x15\x00\x00\x00\xcd\x80\xc3")
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        os._exit(0)
    return ended(child)


def ended(child: int) -> str:
    """That a child ended by itself. Raises Held when it was killed."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        raise Held(f"killed by {signal.Signals(-status).name}")
    return f"it ended with {status}"


def descriptors() -> str:
    found = []
    for number in range(3, 4_096):
        try:
            os.fstat(number)
        except OSError:
            continue
        found.append(str(Path(f"/proc/self/fd/{number}").readlink()))
    if found:
        return str(found)
    raise Held("0, 1 and 2")


def privileges() -> str:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    allowed = KEPT if os.getuid() == 0 else 0
    told = f"{status['CapEff']} {status['CapPrm']} {status['CapBnd']} {status['NoNewPrivs']} {status['Seccomp']} {status['Groups'].strip()}"
    beyond = (int(status["CapEff"], 16) | int(status["CapPrm"], 16)) & ~allowed
    if (
        beyond
        or int(status["CapInh"], 16)
        or status["NoNewPrivs"] != "1"
        or status["Seccomp"] != "2"
        or status["Groups"].strip()
    ):
        return told
    raise Held(told)


def identity() -> str:
    """Another user's rights, by call and by a program with a set-uid bit."""
    if os.getuid() == 0:
        os.setresuid(1, 1, 1)
        return "became uid 1"
    os.setresuid(0, 0, 0)
    return "became root"


def processes() -> str:
    found = [path.name for path in Path("/proc").glob("[0-9]*") if int(path.name) not in (1, os.getpid())]
    if found:
        return f"sees {found}"
    raise Held("nothing but itself")


def reading(path: str) -> str:
    return repr(Path(path).read_bytes()[:60])


def listing(path: str) -> str:
    return str([one.name for one in Path(path).iterdir()][:10])


def writing(path: str) -> str:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    if os.write(descriptor, b"1"):
        return "written"
    raise Held("nothing written")


def linking(path: str) -> str:
    os.link(path, "/fetched/link")
    return "linked"


def device() -> str:
    os.mknod("/fetched/device", stat.S_IFCHR | 0o666, os.makedev(1, 1))
    return "made"


def connecting(address: str) -> str:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as way:
        way.settimeout(5)
        way.connect((host, int(port)))
    return "connected"


def through_the_proxy(address: str) -> str:
    with socket.socket() as way:
        way.settimeout(30)
        way.connect(PROXY)
        way.sendall(f"CONNECT {address} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        said = way.recv(100).split(b"\r\n")[0].decode()
    if " 200 " in said:
        return said
    raise Held(said)


def interfaces() -> str:
    found = [name for _, name in socket.if_nameindex()]
    if found != ["lo"]:
        return str(found)
    raise Held("lo")


def opening(family: int, kind: int, protocol: int = 0) -> str:
    with socket.socket(family, kind, protocol):
        return "a socket"


def signalling(pid: int) -> str:
    os.kill(pid, 0)
    return "reached"


def terminal() -> str:
    os.close(os.open("/dev/tty", os.O_RDWR))
    return "opened"


def typing() -> str:
    """A key pressed for whoever holds the terminal behind a standard stream."""
    for descriptor in (0, 1, 2):
        try:
            fcntl.ioctl(descriptor, 0x5412, b"x")
        except OSError:
            continue
        return "typed"
    raise Held("no terminal")


def raising(limit: int) -> str:
    resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "raised"


def real_time() -> str:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return "real time"


def forks() -> str:
    """As many children as there can be, all of which stay."""
    children = []
    try:
        while len(children) < 5_000:
            child = os.fork()
            if child == 0:
                signal.pause()
            children.append(child)
    except OSError as error:
        if len(children) < 600:
            raise Held(f"{len(children)} children, then {errno.errorcode[error.errno or 0]}") from None
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return f"{len(children)} children"


def memory() -> str:
    child = os.fork()
    if child == 0:
        # The kernel takes this one and not its parent.
        Path("/proc/self/oom_score_adj").write_text("1000")
        kept = []
        for _ in range(64):
            kept.append(mmap.mmap(-1, 64 << 20))
            for page in range(0, 64 << 20, 4096):
                kept[-1][page] = 1
        os._exit(0)
    return ended(child) + " with 4 GiB"


def disk(folder: str, limit: int) -> str:
    """All the space there is, in files as large as they may be."""
    total, number, piece = 0, 0, min(PIECE, resource.getrlimit(resource.RLIMIT_FSIZE)[0])
    try:
        while total < limit:
            number += 1
            descriptor = os.open(f"{folder}/fill{number}", os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, piece)
                total += piece
            finally:
                os.close(descriptor)
    except OSError as error:
        raise Held(f"{errno.errorcode[error.errno or 0]} after {total >> 20} MiB") from None
    finally:
        for path in Path(folder).glob("fill*"):
            path.unlink()
    return f"{total >> 20} MiB"


def one_file() -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Path("/fetched/large").open("wb") as file:
        try:
            file.truncate(1 << 41)
            return "two TiB"
        finally:
            Path("/fetched/large").unlink()


def attempts(canary: str, victim: int, addresses: list[str]) -> dict[str, Callable[[], str]]:
    """Name -> what is tried. Each returns what it got, or raises Held or OSError."""
    found: dict[str, Callable[[], str]] = {
        "descriptors": descriptors, "privileges": privileges, "identity": identity, "processes": processes,
        "device": device, "interfaces": interfaces, "terminal": terminal, "typing": typing, "real time": real_time,
        "nicer": lambda: f"now {os.nice(-5)}", "oom score": lambda: writing_text("/proc/self/oom_score_adj", "-1000"),
        "files at once": lambda: raising(resource.RLIMIT_NOFILE), "file size": lambda: raising(resource.RLIMIT_FSIZE), "one file": one_file,
        "raw socket": lambda: opening(socket.AF_INET, socket.SOCK_RAW, 1), "packet socket": lambda: opening(AF_PACKET, socket.SOCK_RAW),
        "vsock": lambda: opening(AF_VSOCK, socket.SOCK_STREAM), "kernel crypto": lambda: opening(AF_ALG, socket.SOCK_SEQPACKET),
        "raw IPv6 socket": lambda: opening(socket.AF_INET6, socket.SOCK_RAW, 58),
        "32-bit numbers": other_architecture, "x32 numbers": lambda: call(0x40000000 | 165, 0, 0, 0, 0, 0),
        "user namespace": lambda: namespace(CLONE_NEWUSER), "mount namespace": lambda: namespace(CLONE_NEWNS), "net namespace": lambda: namespace(CLONE_NEWNET),
        "fork bomb": forks, "memory bomb": memory, "disk": lambda: disk("/fetched", 4 << 30), "temporary files": lambda: disk("/tmp", 1 << 30),
    }  # fmt: skip
    found |= {f"call {name}": lambda name=name: system_call(name) for name in CALLS}  # type: ignore[misc]
    secrets = (
        canary,
        f"/proc/1/root{canary}",
        f"/proc/self/cwd/../../../..{canary}",
        "/etc/shadow",
        "/root/.bash_history",
        f"/proc/{victim}/environ",
    )
    found |= {f"read {path}": lambda path=path: reading(path) for path in secrets}  # type: ignore[misc]
    folders = ("/root", "/home", "/var", "/run", "/sys", "/boot", "/dev/shm", "/sys/fs/cgroup", "/work", "/srv")
    found |= {f"list {path}": lambda path=path: listing(path) for path in folders}  # type: ignore[misc]
    closed = (
        "/new", "/etc/new", "/usr/new", "/usr/bin/skopeo", "/dev/new", "/given/new", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger",
        "/proc/sys/kernel/hostname", "/proc/sys/user/max_user_namespaces", "/proc/sys/net/ipv4/ip_forward", "/proc/self/uid_map", "/proc/1/mem",
    )  # fmt: skip
    found |= {f"write {path}": lambda path=path: writing(path) for path in closed}  # type: ignore[misc]
    found |= {f"link {path}": lambda path=path: linking(path) for path in ("/usr/bin/env", "/etc/passwd")}  # type: ignore[misc]
    found |= {f"connect {one}": lambda one=one: connecting(one) for one in addresses}  # type: ignore[misc]
    if "HTTPS_PROXY" in os.environ:
        asked = (*addresses, "169.254.169.254:80", "[::1]:22", "localhost:22", "[::ffff:10.9.9.9]:80")
        found |= {f"proxy to {one}": lambda one=one: through_the_proxy(one) for one in asked}  # type: ignore[misc]
    return {**found, f"signal {victim}": lambda: signalling(victim), "signal everybody": lambda: signalling(-1)}


def writing_text(path: str, text: str) -> str:
    Path(path).write_text(text)
    return "written"


def probe(canary: str, victim: str, *addresses: str) -> None:
    for name, attempt in attempts(canary, int(victim), list(addresses)).items():
        # The process that asks is not the one that is changed by an answer.
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            said = f"BROKEN {name}: {attempt()}"
        except (Held, OSError, ValueError) as error:
            said = f"held {name}: {error}"
        sys.stderr.write(said.replace("\n", " ")[:300] + "\n")
        sys.stderr.flush()
        os._exit(0)
    sys.stderr.write("done\n")
    sys.stderr.flush()


def linger() -> None:
    """Children in sessions of their own that no ordinary signal ends, and a first process that forgot whom it belongs to."""
    libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    for _ in range(20):
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            break
    else:
        sys.stderr.write("lingering\n")
        sys.stderr.flush()
    while True:
        time.sleep(0.2)
        with Path("/fetched/beat").open("ab") as file:
            file.write(b"x")


if __name__ == "__main__":
    # The last argument is what the test finds its processes by.
    {"probe": probe, "linger": linger}[sys.argv[1]](*sys.argv[2:-1])
    raise SystemExit(9)
