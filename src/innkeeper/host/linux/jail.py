"""A jail for a program that reads hostile input: namespaces of its own, an unprivileged user, a root of read-only binds, a system call filter.

Runs as a process of its own (`python -m innkeeper.host.linux.jail PLAN`), as root: what it prepares ends with it, and it ends with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from innkeeper.host.linux import mounts
from innkeeper.host.linux.system_call_filter import install_filter

# Uids that nobody has: `0` of a jail is this one on the host, and so on for 65,536 of them. Above the ranges of systemd-nspawn and useradd.
FIRST_UID = 2_000_000_000
UID_COUNT = 65_536
NOBODY = 65_534
PROXY_PORT = 3128
CLONE_NEWIPC, CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWPID = 0x08000000, 0x04000000, 0x10000000, 0x20000000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
LAST_CAPABILITY = 63
# What root of a jail keeps, over its own files alone: umoci and mkfs.erofs read and own what is nobody's else there.
CAPABILITIES = {"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_FSETID": 4}
HOST_TREES = (
    "/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ssl", "/etc/ca-certificates", "/etc/containers/certs.d", "/etc/docker/certs.d",
    "/etc/alternatives", "/etc/ld.so.cache",
)  # fmt: skip
DEVICES = ("null", "zero", "full", "random", "urandom")
TMP_BYTES = 64 * 1_048_576


@dataclass(frozen=True, slots=True)
class JailPlan:
    """What runs, and what it sees beside the programs of the host: `binds` are (path on the host, path in the jail, "ro" or "rw").

    `root` inside means uid 0 of the jail with a few capabilities over the jail's own files; otherwise a user without any. With `listener` (a descriptor of
    a unix socket) a listening socket on 127.0.0.1:3128 of the jail's network is sent there first; the jail has no other way out.
    """

    argv: tuple[str, ...]
    binds: tuple[tuple[str, str, str], ...]
    mount_point: str
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    cwd: str = "/"
    root: bool = False
    listener: int | None = None
    groups: tuple[str, ...] = ()
    file_bytes: int = 1 << 40
    open_files: int = 4_096

    def command(self) -> list[str]:
        """The command that runs the plan. It names no secret: those lie in files that it binds."""
        return [sys.executable, "-I", "-m", "innkeeper.host.linux.jail", json.dumps(dataclasses.asdict(self))]


def main() -> None:
    """Run the plan that is given as JSON and end with the program's status."""
    plan = JailPlan(**json.loads(sys.argv[1]))
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        raise SystemExit(1)
    for directory in plan.groups:
        Path(directory, "cgroup.procs").write_text("0")
    mounts.unshare(CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | mounts.CLONE_NEWNET)
    wanted_read, wanted_write = os.pipe()
    mapped_read, mapped_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(wanted_read)
        os.close(mapped_write)
        try:
            _enter(plan, wanted_write, mapped_read)
        except BaseException as error:
            os.write(2, f"jail: {error}\n".encode(errors="replace"))
        os._exit(126)
    os.close(wanted_write)
    os.close(mapped_read)
    if os.read(wanted_read, 1):
        for name in ("uid_map", "gid_map"):
            Path("/proc", str(child), name).write_text(f"0 {FIRST_UID} {UID_COUNT}\n")
        os.write(mapped_write, b"x")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    raise SystemExit(status if status >= 0 else 128 - status)


def _enter(plan: JailPlan, wanted: int, mapped: int) -> None:
    """Process 1 of the jail, from root of the host to the program."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _raise_loopback()
    if plan.listener is not None:
        _hand_over_listener(plan.listener)
    mounts.unshare(mounts.CLONE_NEWNS)
    _make_root(plan)
    mounts.unshare(CLONE_NEWUSER)
    os.write(wanted, b"x")
    if not os.read(mapped, 1):
        raise SystemExit(1)
    # A namespace below this one would give its maker every capability in it, and with that the kernel's code behind them.
    Path("/proc/sys/user/max_user_namespaces").write_text("0\n")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (plan.file_bytes, plan.file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (plan.open_files, plan.open_files))
    keep = set(CAPABILITIES.values()) if plan.root else set()
    for number in range(LAST_CAPABILITY + 1):
        if number not in keep:
            # Beyond the kernel's last one it says EINVAL.
            mounts.libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    user = 0 if plan.root else NOBODY
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    # A change of uid forgets it.
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.umask(0o022)
    os.chdir(plan.cwd)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    install_filter()
    os.closerange(3, 1 << 16)
    os.execve(plan.argv[0], list(plan.argv), {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", **plan.env})  # noqa: S606, S108  # fmt: skip


def _make_root(plan: JailPlan) -> None:
    """Make the plan's view the root, with nothing of the old one behind it."""
    mounts.mount("none", "/", flags=mounts.MS_REC | mounts.MS_PRIVATE)
    root = Path(plan.mount_point)
    mounts.mount("tmpfs", root, "tmpfs", mounts.MS_NOSUID, "size=1m,mode=755")
    for text in HOST_TREES:
        source = Path(text)
        if source.is_symlink():
            (root / text[1:]).parent.mkdir(parents=True, exist_ok=True)
            (root / text[1:]).symlink_to(source.readlink())
        elif source.exists():
            _bind(source, root / text[1:], "ro")
    (root / "dev").mkdir()
    for name in DEVICES:
        (root / "dev" / name).touch()
        mounts.mount(f"/dev/{name}", root / "dev" / name, flags=mounts.MS_BIND)
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0::/tmp:/bin/false\nnobody:x:65534:65534::/tmp:/bin/false\n")
    (root / "tmp").mkdir()
    mounts.mount("tmpfs", root / "tmp", "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, f"size={TMP_BYTES},mode=1777")
    (root / "proc").mkdir()
    mounts.mount("proc", root / "proc", "proc", mounts.MS_NOSUID | mounts.MS_NODEV | 0x8)
    for source_path, target, mode in plan.binds:
        _bind(Path(source_path), root / target.lstrip("/"), mode)
    mounts.mount("none", root, flags=mounts.MS_REMOUNT | mounts.MS_RDONLY | mounts.MS_NOSUID)
    os.chdir(root)
    if mounts.libc.syscall(PIVOT_ROOT[platform.machine()], b".", b".") < 0:
        raise mounts.oserror("pivot_root", root)
    # Both lie on top of each other now; the old one is the upper.
    mounts.umount2(".", mounts.MNT_DETACH)
    os.chdir("/")


def _bind(source: Path, target: Path, mode: str) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    flags = mounts.MS_NOSUID | mounts.MS_NODEV | (mounts.MS_RDONLY if mode == "ro" else 0)
    mounts.bind(source, target, flags=flags)


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh", b"lo", 0) + bytes(22)
        flags = struct.unpack_from("16sh", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | IFF_UP) + bytes(22))


def _hand_over_listener(descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as way, socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", PROXY_PORT))
        listener.listen(64)
        socket.send_fds(way, [b"x"], [listener.fileno()])


def _prctl(option: int, *values: int) -> None:
    padded: Sequence[int] = (*values, 0, 0, 0, 0)[:4]
    if mounts.libc.prctl(option, *(ctypes.c_ulong(value) for value in padded)) < 0:
        raise mounts.oserror("prctl")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
