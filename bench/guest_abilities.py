"""What a program may do as root in the guest that it runs in: each thing is tried once. Prints a JSON object: name -> "works", or what came of it.

Runs inside a guest, so it needs Python's own library and nothing else, and leaves nothing behind that matters.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
WORKS = "works"
CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWPID = 0x10000000, 0x20000, 0x40000000, 0x20000000
CHILD_SECONDS = 120


def check(result: int) -> int:
    """The result of a call of the C library. Raises OSError."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def call(number: int, *arguments: object) -> int:
    """A system call of x86-64, by its number. Raises OSError."""
    return check(libc.syscall(ctypes.c_long(number), *arguments))


def mount(source: str, target: str, kind: str, options: str = "", flags: int = 0) -> None:
    check(libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()))
    check(libc.umount2(target.encode(), 2))


def place() -> str:
    """A directory of its own on the guest's disk, where everybody may go."""
    path = tempfile.mkdtemp(prefix="abilities-", dir="/var/tmp")
    Path(path).chmod(0o755)
    return path


def tmpfs() -> None:
    mount("tmpfs", place(), "tmpfs")


def bind() -> None:
    mount("/etc", place(), "", flags=4096)


def overlay() -> None:
    upper, work, lower, target = place(), place(), place(), place()
    mount("overlay", target, "overlay", f"lowerdir={lower},upperdir={upper},workdir={work}")


def overlay_on_tmpfs() -> None:
    """As container engines do where the root is an overlay itself."""
    top = place()
    check(libc.mount(b"tmpfs", top.encode(), b"tmpfs", ctypes.c_ulong(0), b""))
    try:
        for name in ("lower", "upper", "work", "target"):
            Path(top, name).mkdir()
        mount("overlay", f"{top}/target", "overlay", f"lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work")
    finally:
        libc.umount2(top.encode(), 2)


def loop_device() -> None:
    control = os.open("/dev/loop-control", os.O_RDWR)
    os.close(control)


def fuse() -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    try:
        mount("fuse", place(), "fuse", f"fd={device},rootmode=40000,user_id=0,group_id=0")
    finally:
        os.close(device)


def io_uring() -> None:
    parameters = ctypes.create_string_buffer(120)
    os.close(call(425, 4, parameters))


def system_call(number: int, *arguments: object) -> Callable[[], None]:
    def attempt() -> None:
        found = call(number, *arguments)
        if found > 2:
            os.close(found)

    return attempt


def in_child(work: Callable[[], None]) -> Callable[[], None]:
    """In a process of its own: what it changes of itself goes with it."""

    def attempt() -> None:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writes, outcome(work).encode())
            os._exit(0)
        os.close(writes)
        said = os.read(reads, 1_000).decode()
        os.close(reads)
        os.waitpid(child, 0)
        if said != WORKS:
            raise RuntimeError(said or "it ended")

    return attempt


def unshare(flags: int) -> Callable[[], None]:
    def attempt() -> None:
        check(libc.unshare(flags))

    return in_child(attempt)


def user_namespace() -> None:
    os.setgid(1000)
    os.setuid(1000)
    check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))


def interface(kind: str) -> Callable[[], None]:
    """An interface of that kind, in a network namespace of its own."""

    def attempt() -> None:
        check(libc.unshare(CLONE_NEWNET))
        line = ["ip", "link", "add", "x0", "type", kind]
        subprocess.run(line, check=True, capture_output=True, timeout=CHILD_SECONDS)

    return in_child(attempt)


def packet_filter() -> None:
    """The socket by which programs speak of nftables with the kernel."""
    netfilter = 12
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netfilter).close()


def raw_socket() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()


def packet_socket() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300).close()


def hostname() -> None:
    socket.sethostname(socket.gethostname())


def clock() -> None:
    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME))


def device_node() -> None:
    os.mknod(f"{place()}/null", 0o20666, os.makedev(1, 3))


def kvm() -> None:
    os.close(os.open("/dev/kvm", os.O_RDWR))


def attributes() -> None:
    path = Path(place(), "file")
    path.touch()
    os.setxattr(path, "user.innkeeper", b"1")


def set_uid() -> None:
    """Whether a set-uid program gets its owner's rights."""
    program = Path(place(), "id")
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    done = subprocess.run([program, "-u"], user=1000, capture_output=True, timeout=CHILD_SECONDS)
    if done.stdout.strip() != b"0":
        raise PermissionError(1, "it runs, without the right")


def sysctl() -> None:
    parameter = Path("/proc/sys/net/ipv4/ip_forward")
    parameter.write_text(parameter.read_text())


def control_groups() -> None:
    mount("none", place(), "cgroup2")


def swap() -> None:
    path = Path(place(), "swap")
    path.write_bytes(bytes(4096 * 64))
    path.chmod(0o600)
    subprocess.run(["/sbin/mkswap", path], check=True, capture_output=True, timeout=CHILD_SECONDS)
    check(libc.swapon(bytes(path), 0))
    check(libc.swapoff(bytes(path)))


def tracing() -> None:
    """As debuggers do."""
    child = os.fork()
    if child == 0:
        os._exit(0 if libc.ptrace(0, 0, None, None) == 0 else 1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise PermissionError(1, "Operation not permitted")


def systemd() -> None:
    if Path("/proc/1/comm").read_text().strip() != "systemd":
        raise RuntimeError("process 1 is the agent")


def performance_counters() -> None:
    attributes = ctypes.create_string_buffer(128)
    ctypes.memmove(attributes, (1).to_bytes(4, "little") + (128).to_bytes(4, "little"), 8)
    os.close(call(298, attributes, 0, -1, -1, 0))


def program_of_the_kernel() -> None:
    """bpf(2): a map of one entry."""
    attributes = ctypes.create_string_buffer(72)
    ctypes.memmove(attributes, b"".join(n.to_bytes(4, "little") for n in (2, 4, 4, 1)), 16)
    os.close(call(321, 0, attributes, 72))


ABILITIES: dict[str, Callable[[], None]] = {
    "mount a tmpfs": tmpfs,
    "bind mount": bind,
    "overlay on the root's disk": overlay,
    "overlay on a tmpfs": overlay_on_tmpfs,
    "loop devices": loop_device,
    "FUSE": fuse,
    "io_uring": io_uring,
    "user and mount namespace, as a user": in_child(user_namespace),
    "mount and pid namespace": unshare(CLONE_NEWNS | CLONE_NEWPID),
    "network namespace": unshare(CLONE_NEWNET),
    "bridge": interface("bridge"),
    "veth": interface("veth"),
    "packet filter (nftables)": packet_filter,
    "control groups (v2)": control_groups,
    "systemd": systemd,
    "set-uid programs": set_uid,
    "raw sockets": raw_socket,
    "packet sockets": packet_socket,
    "user extended attributes": attributes,
    "device nodes": device_node,
    "set the host name": hostname,
    "set the clock": clock,
    "kernel parameters (sysctl)": sysctl,
    "swap": swap,
    "ptrace": tracing,
    "performance counters": performance_counters,
    "bpf": program_of_the_kernel,
    "pidfd_open": system_call(434, os.getpid(), 0),
    "userfaultfd": system_call(323, 0),
    "fanotify": system_call(300, 0, 0),
    "landlock": system_call(444, None, 0, 1),
    "/dev/kvm": kvm,
}


def outcome(attempt: Callable[[], None]) -> str:
    """Try it: WORKS, or what came of it in a few words."""
    try:
        attempt()
    except subprocess.CalledProcessError as error:
        return str(error.stderr.decode().strip().splitlines()[-1][:80])
    except Exception as error:
        return str(getattr(error, "strerror", None) or error or type(error).__name__)
    return WORKS


def main() -> None:
    """Try each."""
    found = {name: outcome(attempt) for name, attempt in ABILITIES.items()}
    json.dump({"kernel": os.uname().release, **found}, sys.stdout)


if __name__ == "__main__":
    main()
