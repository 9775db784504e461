"""The OCI specification of a gVisor machine. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from innkeeper.host.drivers.contract import AGENT_DIRECTORY, LINK_DIRECTORY, VOLUMES_DIRECTORY, MachinePlan

# The set that container runtimes give by default, plus ptrace for debuggers inside. All of them act on gVisor's kernel only: the
# sandbox process itself holds no capability on the host.
CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
)
# The sentry counts inside the guest's cgroup (16 MB measured); without this a guest of 128 MB would have 112.
SENTRY_MEMORY_MB = 32
# pids.max counts sentry threads and stubs besides guest processes (60 guest processes: 115); only a backstop against fork bombs.
PIDS_MAX = 4_096
CPU_PERIOD_US = 100_000


def oci_spec(plan: MachinePlan, *, hub: Path, cgroup_path: str, nofile: int) -> dict[str, Any]:
    """The `config.json` of a machine."""
    caps = list(CAPABILITIES)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [f"{AGENT_DIRECTORY}/inn-agent"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": nofile, "soft": min(nofile, 65_536)}],
            "noNewPrivileges": False,
        },
        "root": {"path": str(plan.rootfs), "readonly": False},
        # Only here: gVisor lets nobody change it later.
        "hostname": plan.hostname,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "noexec", "mode=755"]},
            # Without it the directory is root's alone, and semaphores of users' programs (Python's multiprocessing) fail.
            {
                "destination": "/dev/shm",  # noqa: S108 - in the guest
                "type": "tmpfs",
                "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", f"size={plan.memory_mb // 2}m"],
            },
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": AGENT_DIRECTORY, "type": "bind", "source": str(plan.agent_dir), "options": ["rbind", "ro"]},
            # Read-only: a writable bind would let the guest write to the host's disk outside its quota. Connecting to the socket works all the same.
            {"destination": LINK_DIRECTORY, "type": "bind", "source": str(plan.link_dir), "options": ["rbind", "ro"]},
            # Volumes come and go below it, each written or not as the host has mounted it; the directory itself is read-only there.
            {
                "destination": VOLUMES_DIRECTORY,
                "type": "bind",
                "source": str(hub),
                "options": ["rbind", "rslave", "rw"],
            },
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"},
                {"type": "ipc"},
                {"type": "uts"},
                {"type": "mount"},
                {"type": "network", "path": str(plan.netns)},
            ],
            "cgroupsPath": cgroup_path,
            "resources": {
                "memory": {"limit": (plan.memory_mb + SENTRY_MEMORY_MB) * 1_048_576},
                "cpu": {"quota": plan.vcpu_count * CPU_PERIOD_US, "period": CPU_PERIOD_US},
                "pids": {"limit": PIDS_MAX},
            },
        },
    }
