"""The machine itself: kernel, privileges, user, memory, disk, files. Every check reads a file or two, so none is remembered."""

from __future__ import annotations

import os
import platform
import pwd
import re
import resource
import shlex
import shutil
import sys
from pathlib import Path

from innkeeper import shipped
from innkeeper.host.disks.registry_authorities import read_authorities
from innkeeper.host.probes.check import Check
from innkeeper.settings import Settings

ARCHITECTURES = ("x86_64", "aarch64")
MINIMUM_KERNEL = (5, 10)
KERNEL_FIX = "apt-get install -y linux-image-$(dpkg --print-architecture) && reboot"
# Each with the reason that a person understands; numbers from linux/capability.h.
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
}
MINIMUM_OPEN_FILES = 16_384
MINIMUM_MEMORY_MB = 512


def machine_checks(settings: Settings) -> tuple[Check, ...]:
    """Every check of this file, in the order in which a person reads them."""
    return (
        check_kernel(),
        check_python(),
        check_root(),
        check_capabilities(),
        check_user(settings.api_user),
        check_open_files(),
        check_memory(settings),
        check_disk(settings),
        check_agent(agent_path(settings)),
        check_import_tools(),
        *check_authorities(settings.registry_ca_file),
    )


def is_root() -> bool:
    """Whether the probes that need root can be tried."""
    return os.geteuid() == 0


def check_kernel() -> Check:
    """Architecture and version."""
    name = os.uname()
    found = tuple(int(part) for part in re.findall(r"\d+", name.release)[:2])
    detail = f"Linux {name.release} on {name.machine}"
    if name.machine not in ARCHITECTURES:
        return Check("kernel", False, f"{detail}: gVisor runs on {' and '.join(ARCHITECTURES)}", required=True)
    if found < MINIMUM_KERNEL:
        wanted = ".".join(map(str, MINIMUM_KERNEL))
        return Check(
            "kernel",
            False,
            f"{detail}: {wanted} or newer is needed",
            KERNEL_FIX,
            True,
        )
    return Check("kernel", True, detail, required=True)


def check_python() -> Check:
    """The interpreter that runs the server."""
    good = sys.version_info >= (3, 11)
    return Check(
        "python", good, platform.python_version(), None if good else "apt-get install -y python3", required=True
    )


def check_root() -> Check:
    """The host daemon needs root; the API process does not keep it."""
    if is_root():
        return Check("root", True, "yes", required=True)
    again = shlex.join([sys.argv[0] or "inn", *sys.argv[1:]])
    return Check(
        "root", False, f"running as uid {os.geteuid()}; the host daemon needs root", f"sudo {again}", required=True
    )


def check_capabilities(status: str | None = None) -> Check:
    """Root in a container often lacks some: mounts, namespaces and interfaces need these."""
    text = Path("/proc/self/status").read_text() if status is None else status
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", text, re.MULTILINE)
    held = int(found[1], 16) if found else 0
    missing = [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
    if not missing:
        return Check("capabilities", True, "all that are needed", required=True)
    fix = "setpriv --dump  # run the server where none of these is taken away: not in an unprivileged container"
    return Check("capabilities", False, f"missing: {', '.join(missing)}", fix if is_root() else None, required=True)


def check_user(name: str) -> Check:
    """The user that the API process runs as."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return Check("user", False, f"there is no user '{name}' for the API process", user_fix(name), required=True)
    if entry.pw_uid == 0:
        return Check(
            "user", False, f"'{name}' is root; the API process must not be", "unset INNKEEPER_API_USER", required=True
        )
    return Check("user", True, f"{name} (uid {entry.pw_uid})", required=True)


def user_fix(name: str) -> str:
    """The line that makes a user whom nobody can log in as, with a group of its own."""
    return f"useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin {shlex.quote(name)}"


def check_open_files() -> Check:
    """A guest costs the daemon and its sandbox some descriptors each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= MINIMUM_OPEN_FILES:
        return Check("open files", True, f"limit {'unlimited' if hard == resource.RLIM_INFINITY else hard}")
    return Check("open files", None, f"limit {hard}; {MINIMUM_OPEN_FILES} are good for 100 guests", "ulimit -n 65536")


def check_memory(settings: Settings) -> Check:
    """RAM beyond what is kept for the host."""
    total_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    left = total_mb - settings.memory_reserve_mb
    detail = f"{total_mb} MiB, of which {settings.memory_reserve_mb} are kept for the host"
    if left < MINIMUM_MEMORY_MB:
        smaller = max(0, total_mb - MINIMUM_MEMORY_MB)
        return Check("memory", False, detail, f"export INNKEEPER_MEMORY_RESERVE_MB={smaller // 2}", required=True)
    return Check("memory", True, detail, required=True)


def check_disk(settings: Settings) -> Check:
    """Free space where the state directory is."""
    where = nearest_existing(settings.home)
    free_mb = shutil.disk_usage(where).free >> 20
    detail = f"{free_mb / 1024:.1f} GiB free for {settings.home}"
    if free_mb <= settings.disk_reserve_mb:
        fix = f"du -xh --max-depth=2 {shlex.quote(str(where))} | sort -h | tail  # free at least {settings.disk_reserve_mb - free_mb + 1024} MiB"
        # With rooms on it the server starts: to delete some of them makes space.
        required = not any((settings.host_dir / "instances").glob("*"))
        return Check(
            "disk",
            False,
            f"{detail}; new guests are refused under {settings.disk_reserve_mb} MiB",
            fix,
            required=required,
        )
    return Check("disk", True, detail, required=True)


def check_agent(path: Path) -> Check:
    """The guest agent's static binary, and where it is missing the Go toolchain that builds it."""
    if path.is_file() and os.access(path, os.X_OK):
        return Check("guest agent", True, f"{path} ({path.stat().st_size / 1e6:.1f} MB)", required=True)
    build = f"cd {shlex.quote(str(agent_source()))} && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o {shlex.quote(str(path))} ."
    if shutil.which("go", path=TOOL_PATH) is None:
        build = f"apt-get install -y golang-go && {build}"
    return Check("guest agent", False, f"{path} is not there", build, required=True)


def check_import_tools() -> Check:
    """The programs that `inn image import` needs; everything else works without them."""
    missing = [name for name in ("skopeo", "umoci") if find_tool(name) is None]
    if missing:
        return Check(
            "image import", None, f"{' and '.join(missing)} not installed", f"apt-get install -y {' '.join(missing)}"
        )
    return Check("image import", True, "skopeo and umoci")


def check_authorities(path: Path | None) -> tuple[Check, ...]:
    """The operator's certificate authorities, where there are some: imports could not be begun without them."""
    if path is None:
        return ()
    try:
        read_authorities(path)
    except ValueError as error:
        fix = "unset INNKEEPER_REGISTRY_CA_FILE  # or name a PEM file of certificates"
        return (Check("registry authorities", False, str(error), fix, required=True),)
    return (Check("registry authorities", True, str(path), required=True),)


TOOL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find_tool(name: str) -> str | None:
    """The path of a program as the host daemon finds it (`PATH` of the caller plays no part), or None."""
    return shutil.which(name, path=TOOL_PATH)


def agent_source() -> Path:
    """The folder of the agent's Go module in a checkout."""
    return shipped.CHECKOUT / "guest"


def agent_path(settings: Settings) -> Path:
    """Where the guest agent is, or would be built."""
    return shipped.agent_binary(settings) or settings.agent_binary or shipped.CHECKOUT / "build" / "inn-agent"


def nearest_existing(path: Path) -> Path:
    """`path`, or the closest directory above it that exists."""
    for candidate in (path, *path.parents):
        if candidate.is_dir():
            return candidate
    return Path("/")
