"""The shipped images inside real gVisor: what a user would type, and which files it changes."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.integration.mounted_root import mounted_root

from innkeeper.host.disks.disk_pool import open_pool
from innkeeper.host.disks.image_store import ImageStore
from innkeeper.host.disks.rootfs import DiskPlan, InstanceDisk

sys.path.insert(0, str(Path(__file__).parent))
import image_fixture

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
    pytest.mark.timeout(900),
]

MATPLOTLIB = "python -c 'import matplotlib.pyplot as plt; plt.plot([1,2,3,4]); plt.savefig(\"/tmp/chart.png\")'"


@dataclass(frozen=True)
class Answer:
    output: str
    exit_code: int
    changed: set[str]


Run = Callable[[str], Answer]


@pytest.fixture
async def guest(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Run]:
    """Runs a login shell line as the image's user, each time in a new sandbox on the same disk."""
    name = request.param
    store = ImageStore(tmp_path)
    record = image_fixture.put_into(tmp_path, name).get(name)
    assert record is not None
    pool = await open_pool(tmp_path, size_mib=4096)
    plan = DiskPlan("guest", 1024, (store.mount(record.digest),), tmp_path / "mounts" / "guest")
    async with mounted_root(pool, plan) as disk:
        yield lambda line: run(tmp_path, disk, record.env, line)
    await store.unmount_all()
    await pool.close()
    await image_fixture.assert_nothing_mounted(tmp_path)


def run(scratch: Path, disk: InstanceDisk, env: dict[str, str], line: str) -> Answer:
    bundle = scratch / secrets.token_hex(4)
    bundle.mkdir()
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
    spec = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "args": ["/bin/bash", "-lc", line],
            "env": ["HOME=/home/user", "USER=user", "TERM=xterm", *(f"{key}={value}" for key, value in env.items())],
            "cwd": "/home/user",
            "user": {"uid": 1000, "gid": 1000},
        },
        "root": {"path": str(disk.root)},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
        ],
        "linux": {"namespaces": namespaces},
    }
    (bundle / "config.json").write_text(json.dumps(spec))
    before = files_of(disk.upper)
    done = subprocess.run(
        ["runsc", f"--root={scratch / 'runsc'}", "--platform=systrap", "--ignore-cgroups", "--network=none",
         "--overlay2=none", "run", "-bundle", str(bundle), f"innimg-{bundle.name}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    after = files_of(disk.upper)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    return Answer(done.stdout, done.returncode, changed)


def files_of(upper: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in upper.rglob("*"):
        status = path.lstat()
        if not path.is_dir():
            found[f"/{path.relative_to(upper)}"] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("guest", ["python-data-science"], indirect=True)
async def test_a_chart_changes_exactly_one_file_and_says_nothing(guest: Run) -> None:
    answer = guest(MATPLOTLIB)
    assert (answer.output, answer.exit_code, answer.changed) == ("", 0, {"/tmp/chart.png"})
    versions = guest(
        "python -c 'import numpy, pandas, scipy; print(pandas.DataFrame({\"a\": numpy.arange(4)}).a.sum())'"
    )
    assert (versions.output, versions.changed) == ("6\n", set())


@pytest.mark.parametrize("guest", ["base"], indirect=True)
async def test_the_base_image_is_a_developers_home(guest: Run) -> None:
    answer = guest(
        "id -un; pwd; echo $PATH | cut -d: -f1; locale charmap; grep -c ' /tmp ' /proc/mounts; sudo true; echo $?"
    )
    user, home, first, charmap, tmp_mounts, *sudo = answer.output.splitlines()
    assert (user, home, first, charmap, tmp_mounts) == ("user", "/home/user", "/home/user/.local/bin", "UTF-8", "0")
    # There is no agent here to be sudo, but sudo is the agent and nothing else.
    assert sudo[-1] == "127"
    assert answer.changed == set()
    assert guest("echo 'int main(){return 7;}' > a.c && make -s a && ./a").exit_code == 7
    git = guest(
        "git init -q r && cd r && git -c user.name=a -c user.email=b commit -q --allow-empty -m x && git log --format=%s"
    )
    assert git.output.splitlines()[-1] == "x"


@pytest.mark.parametrize("guest", ["base"], indirect=True)
async def test_pip_installs_for_the_user_without_a_virtual_environment(guest: Run) -> None:
    made = guest(
        'mkdir p && cd p && printf \'def main(): print(41 + 1)\\n\' > answer.py && printf \'[project]\\nname="answer"\\nversion="1"\\n'
        '[project.scripts]\\nanswer="answer:main"\\n[build-system]\\nrequires=["setuptools"]\\nbuild-backend="setuptools.build_meta"\\n'
        '[tool.setuptools]\\npy-modules=["answer"]\\n\' > pyproject.toml && pip install --quiet --no-build-isolation . && answer'
    )
    assert (made.exit_code, made.output.splitlines()[-1]) == (0, "42")
    assert "/home/user/.local/bin/answer" in made.changed
    assert guest("answer").output == "42\n"
    assert guest("python -m venv v && v/bin/python -m pip --version | cut -d' ' -f1").output == "pip\n"


@pytest.mark.parametrize("guest", ["base"], indirect=True)
async def test_screen_and_tmux_keep_programs_running(guest: Run) -> None:
    answer = guest(
        "screen -dmS job bash -c 'echo hello from screen; sleep 60'; tmux new-session -d -s pane 'sleep 60'; sleep 1;"
        "screen -S job -X hardcopy /tmp/seen; sleep 0.5; head -1 /tmp/seen; screen -ls | grep -c job; tmux ls | cut -d: -f1;"
        "screen -dmS short true; sleep 2; screen -ls | grep -c short; screen -S job -X quit; sleep 0.5; screen -ls | tail -2 | head -1"
    )
    assert answer.output.splitlines()[:4] == ["hello from screen", "1", "pane", "0"]
    assert "No Sockets found" in answer.output


@pytest.mark.parametrize("guest", ["node"], indirect=True)
async def test_npm_installs_programs_for_the_user(guest: Run) -> None:
    made = guest(
        "mkdir p && cd p && printf '#!/usr/bin/env node\\nconsole.log(6 * 7)\\n' > h.js && "
        """printf '{"name":"answer","version":"1.0.0","bin":{"answer":"h.js"}}' > package.json && """
        "npm install --global --offline --silent . && answer && node -p process.version | cut -c1-2"
    )
    assert (made.exit_code, made.output.splitlines()[-2]) == (0, "42")
    assert made.output.splitlines()[-1].startswith("v")
    assert guest("answer").output == "42\n"
