"""What doctor says about this very machine, and that no way of ending leaves anything of it behind."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from innkeeper.host.inventory import PROBES, choose_platform, refuse_reasons, take_inventory
from innkeeper.host.linux import command
from innkeeper.host.probes import network, sandbox
from innkeeper.host.probes.control_groups import probe_control_groups
from innkeeper.host.probes.filesystems import probe_filesystems
from innkeeper.host.probes.firewall import check_forwarding
from innkeeper.settings import Settings

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


def _traces(top: Path) -> set[str]:
    """What a probe of this process could have left: below `top`, where its temporary files are, or under its pid. Others run probes, too."""
    word = str(top)
    found = {f"file {path}" for path in top.rglob("*inn-probe-*")}
    found |= {f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if word in line}
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if word in backing.read_text():
                found.add(f"loop {backing}")
    for pattern in ("", "*/"):
        found |= {f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(f"{pattern}innkeeper-probe-{os.getpid()}-*")}
    return found | {f"process {pid}" for pid in _pids_with(os.fsencode(word))}


def _exists(top: Path, pattern: str) -> bool:
    return any(top.glob(pattern))


def _pids_with(*words: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if all(word in line for word in words):
                found.append(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = _traces(tmp_path)
    yield
    deadline = time.monotonic() + 3
    while (left := _traces(tmp_path) - before) and time.monotonic() < deadline:
        time.sleep(0.02)  # the kernel takes a dead namespace's mounts and loop devices away a moment later
    assert left == set()


def _doctor(*argv: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    code = "from innkeeper.cli.main import main; main()"
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "INNKEEPER_HOME": str(home), **env}
    return subprocess.run(
        [sys.executable, "-c", code, "doctor", *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_doctor_says_the_truth_about_this_machine(tmp_path: Path) -> None:
    ended = _doctor("--json", home=tmp_path)
    found = json.loads(ended.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert ended.returncode == (0 if found["ok"] else 1), ended.stderr
    for name in (
        "root",
        "runsc",
        "sandbox",
        "runsc network",
        "cgroups",
        "loop devices",
        "overlay",
        "erofs",
        "reflink",
        "nft",
        "iproute2",
    ):
        assert checks[name]["ok"] is True, checks[name]
    # None of what microVMs need is demanded; each has its line.
    assert checks["guest kernel"]["ok"] is None
    assert checks["guest kernel"]["fix"] == f"inn kernel fetch --home {tmp_path}"
    assert (checks["vm user"]["ok"] or "useradd --system" in checks["vm user"]["fix"]) and not checks["vm user"][
        "required"
    ]
    assert found["facts"]["platform"] in ("systrap", "ptrace")
    assert min(found["facts"]["exec_us"].values()) > 200_000  # ten pauses of 20 ms
    # Neither agent nor user may be there yet; then doctor must say so, and how to get them.
    for check in checks.values():
        if check["ok"] is False:
            assert check["fix"] and "\n" not in check["fix"], check
    assert not (tmp_path / "host").exists()


async def test_a_kernel_without_connection_timeouts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a kernel refuses the rules as this one does those of a protocol that it never heard of."""
    monkeypatch.setattr(network, "NFT_TIMEOUTS", network.NFT_TIMEOUTS.replace(b"close: 5", b"nosuchstate: 5"))
    check = next(one for one in (await network.probe_network()).checks if one.name == "nft")
    assert (check.ok, check.required) == (False, True)
    assert "CONFIG_NF_CONNTRACK_TIMEOUT" in check.detail and str(check.fix).startswith(
        "apt-get install -y linux-image-"
    )


def test_plain_output_is_one_line_a_check_and_one_fix_a_failure(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    ended = _doctor(home=tmp_path, INNKEEPER_RUNSC="/nonexistent/runsc", INNKEEPER_API_USER="no-such-user-here")
    assert ended.returncode == 1 and ended.stderr == ""
    lines = ended.stdout.splitlines()
    assert lines[-1].startswith("The gVisor driver cannot run here")
    for position, line in enumerate(lines[:-1]):
        assert re.match(r"(ok   |warn |FAIL ) \S|      FIX: \S", line), line
        if line.startswith("FAIL"):
            assert lines[position + 1].startswith("      FIX: ")
    text = ended.stdout
    assert "FAIL  runsc" in text and "backports" in text and "useradd --system" in text


async def test_a_second_look_is_quick_and_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    settings = Settings(home=tmp_path)
    first = await take_inventory(settings)
    started = time.perf_counter()
    again = await take_inventory(settings)
    full = time.perf_counter() - started
    took = full
    for _ in range(3):
        started = time.perf_counter()
        quick = await take_inventory(settings, quick=True)
        took = min(took, time.perf_counter() - started)
    assert [check.name for check in quick.checks] == [check.name for check in first.checks]
    assert refuse_reasons(quick) == refuse_reasons(first)
    # Some 0.1 s against some 3 s: sandboxes that are started, or none.
    assert took < full / 2, f"{took * 1000:.0f} ms of {full * 1000:.0f}"
    started = time.perf_counter()
    choice = await choose_platform(settings)
    assert choice.platform == again.facts["platform"] and time.perf_counter() - started < full / 2


async def test_a_platform_that_does_not_run_is_named_and_not_chosen(tmp_path: Path) -> None:
    real = sandbox.locate_runsc("runsc")
    assert real is not None
    wrapper = tmp_path / "runsc"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *--platform=ptrace*) echo \'no ptrace here\' >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    findings = await sandbox.probe_sandbox(str(wrapper), "auto")
    assert findings.good and findings.facts["errors"] == {"ptrace": "no ptrace here"}
    assert sandbox.faster(findings.facts["exec_us"]) == "systrap"
    assert "ptrace does not run: no ptrace here" in findings.checks[1].detail


async def test_a_runsc_that_hangs_is_killed_with_everything_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sandbox, "RUN_SECONDS", 0.5)
    hanging = tmp_path / "runsc"
    # As the real one: a child in a session of its own that names the bundle and outlives its parent.
    hanging.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo runsc version release-20260101.0\nsetsid python3 -c "import time; time.sleep(60)" "$@" &\nsleep 60\n'
    )
    hanging.chmod(0o755)
    findings = await sandbox.probe_sandbox(str(hanging), "systrap")
    assert not findings.good and findings.checks[1].fix
    assert "no end within" in findings.checks[1].detail


@pytest.mark.parametrize("after_ms", [1, 3, 20, 60, 120, 250, 400])
async def test_cancelling_at_any_moment_leaves_nothing(after_ms: int, tmp_path: Path) -> None:
    runsc = sandbox.locate_runsc("runsc")
    assert runsc is not None
    for probe in (
        probe_filesystems(tmp_path),
        sandbox.measure_platforms(runsc, ("systrap",), hide=await sandbox.start_up_trap()),
        probe_control_groups(),
    ):
        task = asyncio.ensure_future(probe)
        await asyncio.sleep(after_ms / 1000)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await asyncio.sleep(0.1)  # the loop closes the pipes of killed commands when their last holder has died


async def test_a_killed_helper_takes_its_mounts_along(tmp_path: Path) -> None:
    task = asyncio.ensure_future(probe_filesystems(tmp_path))
    killed = 0
    deadline = time.monotonic() + 10
    while not task.done() and time.monotonic() < deadline:
        await asyncio.sleep(0.002)
        if not _exists(tmp_path, ".inn-probe-*/disk"):
            continue
        for pid in _pids_with(b"innkeeper.host.probes.filesystems", os.fsencode(tmp_path)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
                killed += 1
    findings = await task
    assert killed and not findings.good


def test_missing_tools_are_failures_with_a_fix(tmp_path: Path) -> None:
    # The helper sees a PATH in which mkfs.erofs and mkfs.xfs are missing.
    for name in ("unshare", "mkfs.ext4"):
        for folder in ("/usr/bin", "/usr/sbin", "/sbin", "/bin"):
            if (Path(folder) / name).exists():
                (tmp_path / name).symlink_to(Path(folder) / name)
                break
    (tmp_path / "state").mkdir()
    script = (
        "import asyncio, json, sys\nfrom pathlib import Path\nfrom innkeeper.host.linux import command\n"
        f"command.MINIMAL_ENVIRONMENT = {{'PATH': {str(tmp_path)!r}}}\n"
        "import structlog, logging\nstructlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))\n"
        "from innkeeper.host.probes import filesystems\n"
        "json.dump(asyncio.run(filesystems._try_all(Path(sys.argv[1]))), sys.stdout)\n"
    )
    directory = tmp_path / "state" / ".inn-probe-x"
    directory.mkdir()
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", script, str(directory)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(ended.stdout)
    assert found["loop devices"]["ok"] and found["overlay"]["ok"]
    assert not found["erofs"]["ok"] and "cannot start" in found["erofs"]["detail"]
    shutil.rmtree(directory)


async def test_a_dropping_firewall_is_found_and_its_fix_fixes_it(tmp_path: Path) -> None:
    netns = f"inndoctor{secrets.token_hex(3)}"
    settings = Settings(home=tmp_path, host_netns=netns)
    await command.run(["ip", "netns", "add", netns])
    try:
        assert (await check_forwarding(settings)).ok
        rules = b"table ip filter {\n chain FORWARD {\n  type filter hook forward priority 0; policy drop;\n }\n}\n"
        await command.run(["ip", "netns", "exec", netns, "nft", "-f", "-"], stdin=rules)
        dropping = await check_forwarding(settings)
        assert dropping.ok is False and not dropping.blocks and dropping.fix
        await command.run(["ip", "netns", "exec", netns, "sh", "-ec", dropping.fix])
        assert (await check_forwarding(settings)).ok
    finally:
        await command.run(["ip", "netns", "delete", netns])


async def test_every_probe_answers_alone(tmp_path: Path) -> None:
    for name, probe in PROBES.items():
        findings = await probe(Settings(home=tmp_path))
        assert findings.checks and findings.good, name
