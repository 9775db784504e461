"""A seccomp filter for programs that only read, compute and write files: what changes the system or looks into others is refused with EPERM."""

from __future__ import annotations

import ctypes
import platform
import struct

from innkeeper.host.linux import mounts

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
BPF_LOAD_WORD, BPF_JUMP_EQUAL, BPF_JUMP_AT_LEAST, BPF_RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050001  # the last: errno EPERM
NO_SUCH_FAMILY = 0x00050061  # errno EAFNOSUPPORT
NUMBER_OFFSET, ARCHITECTURE_OFFSET, FIRST_ARGUMENT_OFFSET = 0, 4, 16
SOCKET = (41, 198)
# AF_UNIX, AF_INET, AF_INET6, AF_NETLINK. Others lead out of a network namespace (AF_VSOCK to the machine's own host), or into code that few have looked at.
FAMILIES = (1, 2, 10, 16)
X32_BIT = 0x40000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Numbers of asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64). From 424 on they are the same everywhere.
REFUSED = {
    "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171), "bpf": (321, 280), "chroot": (161, 51), "clock_adjtime": (305, 266),
    "clock_settime": (227, 112), "delete_module": (176, 106), "fanotify_init": (300, 262), "finit_module": (313, 273), "init_module": (175, 105),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "kcmp": (312, 272), "kexec_file_load": (320, 294), "kexec_load": (246, 104),
    "keyctl": (250, 219), "lookup_dcookie": (212, 18), "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429),
    "name_to_handle_at": (303, 264), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117), "quotactl": (179, 60),
    "reboot": (169, 142), "request_key": (249, 218), "setdomainname": (171, 162), "sethostname": (170, 161), "setns": (308, 268),
    "settimeofday": (164, 170), "swapoff": (168, 225), "swapon": (167, 224), "syslog": (103, 116), "umount2": (166, 39), "unshare": (272, 97),
    "userfaultfd": (323, 282), "vhangup": (153, 58),
}  # fmt: skip


def instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """The program for a machine as (code, jump if true, jump if false, value)."""
    column = list(ARCHITECTURES).index(machine)
    numbers = sorted(pair[column] for pair in REFUSED.values())
    program = [
        (BPF_LOAD_WORD, 0, 0, ARCHITECTURE_OFFSET),
        (BPF_JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (BPF_RETURN, 0, 0, KILL),
        (BPF_LOAD_WORD, 0, 0, NUMBER_OFFSET),
    ]
    if machine == "x86_64":
        # The x32 calls have numbers of their own, and nothing here uses them.
        program += [(BPF_JUMP_AT_LEAST, 0, 1, X32_BIT), (BPF_RETURN, 0, 0, REFUSE)]
    count = len(FAMILIES)
    sockets = [
        (BPF_JUMP_EQUAL, 0, count + 2, SOCKET[column]),
        (BPF_LOAD_WORD, 0, 0, FIRST_ARGUMENT_OFFSET),
        *((BPF_JUMP_EQUAL, count - at, 0, family) for at, family in enumerate(FAMILIES)),
        (BPF_RETURN, 0, 0, NO_SUCH_FAMILY),
    ]
    program += [(BPF_JUMP_EQUAL, len(numbers) - at + len(sockets), 0, number) for at, number in enumerate(numbers)]
    return [*program, *sockets, (BPF_RETURN, 0, 0, ALLOW), (BPF_RETURN, 0, 0, REFUSE)]


def install_filter() -> None:
    """Put the filter on this thread and everything that it starts; needs no_new_privs. Raises OSError."""
    packed = b"".join(struct.pack("HBBI", *one) for one in instructions(platform.machine()))
    text = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("HxxxxxxP", len(packed) // 8, ctypes.addressof(text))
    buffer = ctypes.create_string_buffer(program, len(program))
    if mounts.libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), buffer, 0, 0) < 0:
        raise mounts.oserror("prctl")
