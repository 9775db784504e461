"""gVisor: which runsc there is, whether each platform really runs a process here, and which is the faster.

A probe sandbox sees this host's /usr read-only, has an empty network of its own, and lives in one temporary directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innkeeper.host.linux import command
from innkeeper.host.probes.check import Check, Findings
from innkeeper.host.probes.machine import TOOL_PATH

MINIMUM_RELEASE = 20230101
PLATFORMS = ("systrap", "ptrace")
ROUNDS = 2
RUN_SECONDS = 20
KILL_ROUNDS = 200
# A platform must be clearly faster to displace systrap, gVisor's own default: medians here drift by a tenth.
ADVANTAGE = 0.9
# At the pace of an API client, not back to back: what differs between the platforms is waking up.
WORKLOAD = """s=$(date +%s%N); i=0
while [ $i -lt 10 ]; do /bin/sleep 0.02; /bin/true; i=$((i+1)); done
e=$(date +%s%N); echo $(((e-s)/1000))"""
# Kernels since 6.18 show this file in every network namespace, which runsc takes for the host's own and refuses to start.
TRAP_FILE = "/proc/sys/net/core/rmem_default"
HIDE = 'mount -t tmpfs -o size=4k none /proc/sys/net && exec "$@"'

BACKPORTS_FIX = (
    "echo 'deb http://deb.debian.org/debian bookworm-backports main' > /etc/apt/sources.list.d/bookworm-backports.list"
    " && apt-get update && apt-get install -y -t bookworm-backports runsc"
)


@dataclass(frozen=True, slots=True)
class Runsc:
    """An installed runsc: `release` is the date in its version as a number, 0 where it has none."""

    path: str
    version: str
    release: int


def locate_runsc(name: str) -> str | None:
    """The path of the runsc that the settings name, or None."""
    return shutil.which(name, path=TOOL_PATH)


def install_fix() -> str:
    """The command that installs a good runsc on this release of Debian."""
    with contextlib.suppress(OSError):
        if "VERSION_CODENAME=bookworm" in Path("/etc/os-release").read_text():
            return BACKPORTS_FIX
    return "apt-get update && apt-get install -y runsc"


def parse_version(text: str) -> tuple[str, int]:
    """`runsc --version`'s answer as (version, release date as a number): `("release-20240729.0", 20240729)`."""
    version = text.splitlines()[0].removeprefix("runsc version ").strip() if text else ""
    found = re.search(r"(20\d{6})(?!\d)", version)
    return version or "unknown", int(found[1]) if found else 0


async def probe_runsc(name: str) -> tuple[Runsc | None, Check]:
    """The runsc of the settings, and the verdict on its age."""
    path = locate_runsc(name)
    if path is None:
        return None, Check("runsc", False, f"{name} is not installed", install_fix(), required=True)
    try:
        answer = await command.run([path, "--version"], timeout_seconds=10)
    except command.CommandFailed as error:
        return None, Check("runsc", False, f"{path} does not run: {error.reason}", install_fix(), required=True)
    version, release = parse_version(answer.stdout.decode(errors="replace"))
    runsc = Runsc(path, version, release)
    if release == 0:
        return runsc, Check(
            "runsc", None, f"{version} ({path}): a version of unknown age", install_fix(), required=True
        )
    if release < MINIMUM_RELEASE:
        detail = f"{version} ({path}) is too old; 2023 or newer is needed"
        return runsc, Check("runsc", False, detail, install_fix(), required=True)
    return runsc, Check("runsc", True, f"{version} ({path})", required=True)


async def probe_sandbox(name: str, wanted: str) -> Findings:
    """Everything about gVisor. `wanted` is `settings.runsc_platform`.

    Facts: `runsc`, `version`, `hide_proc_sys_net`, `exec_us` {platform: microseconds of the workload}, `errors` {platform: why not}.
    """
    runsc, age = await probe_runsc(name)
    if runsc is None or age.blocks:
        return Findings((age,))
    trap = await start_up_trap()
    exec_us, errors = await measure_platforms(runsc.path, PLATFORMS if wanted == "auto" else (wanted,), hide=trap)
    facts: dict[str, Any] = {
        "runsc": runsc.path,
        "version": runsc.version,
        "hide_proc_sys_net": trap,
        "exec_us": exec_us,
        "errors": errors,
    }
    return Findings((age, _check_sandbox(exec_us, errors), _check_trap(trap, worked=bool(exec_us))), facts)


def _check_sandbox(exec_us: dict[str, int], errors: dict[str, str]) -> Check:
    if exec_us:
        times = ", ".join(f"{platform} {microseconds / 1000:.0f} ms" for platform, microseconds in exec_us.items())
        broken = "".join(f"; {platform} does not run: {why}" for platform, why in errors.items())
        return Check("sandbox", True, f"a sandbox runs commands (30 processes: {times}){broken}", required=True)
    why = "; ".join(f"{platform}: {reason}" for platform, reason in errors.items())
    fix = f"{install_fix()} && sysctl -w kernel.unprivileged_userns_clone=1 kernel.yama.ptrace_scope=0"
    return Check("sandbox", False, f"no sandbox starts ({why})", fix, required=True)


def _check_trap(trap: bool, *, worked: bool) -> Check:
    if not trap:
        return Check("runsc network", True, "starts with a network of its own", required=True)
    detail = "this kernel shows net.core in every namespace, which runsc refuses"
    if worked:
        return Check("runsc network", True, f"{detail}: handled by hiding /proc/sys/net from it", required=True)
    return Check("runsc network", False, f"{detail}, also with /proc/sys/net hidden", install_fix(), required=True)


async def start_up_trap() -> bool:
    """Whether a fresh network namespace shows TRAP_FILE."""
    answer = await command.run(["unshare", "--net", "test", "-e", TRAP_FILE], check=False, timeout_seconds=5)
    return answer.returncode == 0


async def measure_platforms(
    runsc: str, platforms: tuple[str, ...], *, hide: bool
) -> tuple[dict[str, int], dict[str, str]]:
    """Run the workload on each platform in turn, ROUNDS times: ({platform: best microseconds}, {platform: why it does not run})."""
    best: dict[str, int] = {}
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="inn-probe-") as directory:
        bundle = _write_bundle(Path(directory))
        for _ in range(ROUNDS if len(platforms) > 1 else 1):
            for platform in platforms:
                if platform in errors:
                    continue
                try:
                    took = await _run_once(runsc, platform, bundle, hide=hide)
                except (command.CommandFailed, ValueError) as error:
                    errors[platform] = _why(error)
                    best.pop(platform, None)
                else:
                    best[platform] = min(took, best.get(platform, took))
    return best, errors


def faster(exec_us: dict[str, int]) -> str | None:
    """The platform to use: systrap, unless another is clearly faster; None when none runs."""
    if not exec_us:
        return None
    quickest = min(exec_us, key=lambda platform: exec_us[platform])
    systrap = exec_us.get("systrap")
    return "systrap" if systrap is not None and exec_us[quickest] > systrap * ADVANTAGE else quickest


async def _run_once(runsc: str, platform: str, bundle: Path, *, hide: bool) -> int:
    name = f"inn-probe-{os.getpid()}-{secrets.token_hex(4)}"
    # fmt: off
    sandbox = [
        runsc, "--root", str(bundle / "state"), f"--platform={platform}", "--ignore-cgroups", "--network=sandbox",
        "--overlay2=none", "--host-uds=none", "run", "-bundle", str(bundle), name,
    ]
    # fmt: on
    if hide:
        sandbox = ["sh", "-c", HIDE, "sh", *sandbox]
    argv = ["unshare", "--net", "--mount", "--propagation", "private", *sandbox]
    try:
        answer = await command.run(argv, timeout_seconds=RUN_SECONDS)
        return int(answer.stdout)
    except BaseException:
        await _kill_all_with(os.fsencode(bundle))
        raise


async def _kill_all_with(word: bytes) -> None:
    """Kill every process that names the bundle, and wait until none is left.

    The sandbox and its gofer lead sessions of their own: killing runsc's group does not reach them. Should a cancellation cut the
    waiting short, they are killed all the same.
    """
    quiet = 0
    for _ in range(KILL_ROUNDS):
        # Twice, because a process that was being forked during the first look may not have shown.
        quiet = 0 if _kill_once(word) else quiet + 1
        if quiet == 2:
            return
        await asyncio.sleep(0.01)


def _kill_once(word: bytes) -> bool:
    """Kill what names `word` now; whether there was any. A zombie's command line is empty."""
    found = False
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if word in (entry / "cmdline").read_bytes():
                found = True
                os.kill(int(entry.name), signal.SIGKILL)
    return found


def _why(error: Exception) -> str:
    if isinstance(error, command.CommandFailed):
        lines = error.stderr_tail.splitlines()
        return (lines[-1] if lines else error.reason)[-200:]
    return "its output is not a number"


def _write_bundle(directory: Path) -> Path:
    rootfs = directory / "rootfs"
    mounts: list[dict[str, Any]] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        # With all that is mounted below it: the kernel does not let runsc's user namespace take the directory without.
        {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
    ]
    for name in ("usr", "proc", "dev", "state"):
        ((directory if name == "state" else rootfs) / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        source = Path("/") / name
        if source.is_symlink():
            (rootfs / name).symlink_to(source.readlink())
        elif source.is_dir():
            (rootfs / name).mkdir()
            mounts.append(
                {"destination": f"/{name}", "type": "bind", "source": str(source), "options": ["rbind", "ro"]}
            )
    spec = {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/bin/sh", "-c", WORKLOAD],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "user": {"uid": 65_534, "gid": 65_534},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "probe",
        "mounts": mounts,
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
    }
    (directory / "config.json").write_text(json.dumps(spec))
    return directory
