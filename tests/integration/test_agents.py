"""Agents in guests: each that is listed is built of its lock from the registries, starts, and keeps running as its description says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host
from tests.integration.image_fixture import RECIPES, put_into

from innkeeper.core.agent import Agent
from innkeeper.host.agent_recipes import load_agents

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC, pytest.mark.timeout(3_600)]
AGENTS = {agent.id: agent for agent, _ in load_agents(RECIPES).values() if agent.unavailable is None}
SECONDS = 300.0
# Stands for a user's key: no agent calls anybody here, where guests have no network.
KEY = "not-a-real-key"


def locked_version(agent: Agent) -> str:
    """The version of the agent's own package in its lock."""
    folder = RECIPES / "agents" / agent.id
    if (folder / "npm").is_dir():
        wanted: dict[str, str] = json.loads((folder / "npm" / "package.json").read_text())["dependencies"]
        return next(version for name, version in wanted.items() if name.rpartition("/")[2] == agent.id)
    lock = (folder / "pip" / "requirements.txt").read_text()
    found = re.search(rf"^{agent.id}(-chat|-agent)?==(\S+)", lock, re.MULTILINE)
    assert found is not None
    return found[2]


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with running_host(tmp_path / "home") as host:
        yield host


# Each is hundreds of megabytes from the registries.
@pytest.mark.long
@pytest.mark.parametrize("agent", [pytest.param(agent, id=name) for name, agent in AGENTS.items()])
async def test_an_agent_is_built_and_starts(host: Host, agent: Agent) -> None:
    if (RECIPES / "agents" / agent.id / "npm").is_dir() and shutil.which("npm") is None:
        pytest.skip("needs npm")
    store = put_into(host.settings.host_dir, agent.id)
    record = store.get(agent.id)
    assert record is not None
    shape = host.shape(image_digest=record.digest, memory_mb=agent.memory_mb, disk_mb=4096, user=agent.user)
    guest = await host.ensure(shape=shape, user=agent.user, workdir=agent.workdir)
    version = await host.ok(guest, shlex.join(agent.version_argv), timeout_seconds=SECONDS)
    print(f"{agent.id}: {version.text.strip()}", file=sys.stderr)
    assert locked_version(agent) in version.text

    # What the agent shows stays to be read when it gives up, as some do that reach no model.
    await host.ok(guest, "echo 'set -g remain-on-exit on' > ~/.tmux.conf")
    # The main process, with what it alone is given.
    variables = [f"{name}={value}" for name, value in agent.environment(agent.models[0], KEY).items()]
    start = shlex.join(["/usr/bin/env", *variables, *agent.argv])
    await host.ok(guest, f"cd {agent.workdir} && (setsid {start} > /tmp/agent.log 2>&1 & echo $! > /tmp/agent.pid)")
    assert agent.health.command is not None
    check = f"{shlex.join(agent.health.command)} && kill -0 $(cat /tmp/agent.pid)"

    async def healthy() -> bool:
        return (await host.run(guest, check, timeout_seconds=SECONDS)).exit_code == 0

    async def shows_its_name() -> bool:
        # Lines of a terminal are cut where they end.
        shown = await host.run(guest, "tmux -L agent capture-pane -p -J -S - -t agent", timeout_seconds=SECONDS)
        return agent.name.split()[0].lower() in shown.text.lower()

    await eventually(healthy, seconds=SECONDS)
    await eventually(shows_its_name, seconds=SECONDS)
    assert await healthy()
    await host.ok(guest, "tmux -L agent kill-server")

    async def ended() -> bool:
        return (await host.run(guest, "kill -0 $(cat /tmp/agent.pid)")).exit_code != 0

    await eventually(ended, seconds=SECONDS)
    assert not await healthy()
    await host.destroy(guest)
