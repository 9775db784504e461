"""Agents in guests: each that is listed is built of its lock from the registries, starts, and keeps running as its description says."""

from __future__ import annotations

import json
import re
import shlex
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
# Built and started whenever the suite runs; the others in the long run.
ALWAYS = "claude-code"
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


@pytest.mark.parametrize(
    "agent",
    [pytest.param(agent, id=name, marks=() if name == ALWAYS else pytest.mark.long) for name, agent in AGENTS.items()],
)
async def test_an_agent_is_built_and_starts(host: Host, agent: Agent) -> None:
    store = put_into(host.settings.host_dir, agent.id)
    record = store.get(agent.id)
    assert record is not None
    shape = host.shape(image_digest=record.digest, memory_mb=agent.memory_mb, disk_mb=4096, user=agent.user)
    guest = await host.ensure(shape=shape, user=agent.user, workdir=agent.workdir)
    version = await host.ok(guest, shlex.join(agent.version_argv), timeout_seconds=SECONDS)
    print(f"{agent.id}: {version.text.strip()}", file=sys.stderr)
    assert locked_version(agent) in version.text

    # The main process, with what it alone is given.
    model = agent.models[0]
    variables = [f"{name}={value}" for name, value in agent.environment(model, KEY).items()]
    start = shlex.join(["/usr/bin/env", *variables, *agent.argv])
    await host.ok(
        guest,
        f"cd {agent.workdir} && setsid {start} > /tmp/agent.log 2>&1 & echo $! > /tmp/agent.pid",
        timeout_seconds=SECONDS,
    )
    assert agent.health.command is not None
    check = shlex.join(agent.health.command)

    async def healthy() -> bool:
        answer = await host.run(guest, f"{check} && kill -0 $(cat /tmp/agent.pid)", timeout_seconds=SECONDS)
        return answer.exit_code == 0

    await eventually(healthy, seconds=SECONDS)
    # It says something on its terminal, and goes on.
    await eventually(lambda: said_something(host, guest), seconds=SECONDS)
    assert await healthy()
    await host.ok(
        guest, "tmux -L agent kill-server; while kill -0 $(cat /tmp/agent.pid) 2> /dev/null; do sleep 0.1; done"
    )
    await host.destroy(guest)


async def said_something(host: Host, guest: object) -> bool:
    """Whether the agent's session shows any text."""
    shown = await host.ok(guest, "tmux -L agent capture-pane -p -t agent", timeout_seconds=SECONDS)  # type: ignore[arg-type]
    print(shown.text.strip(), file=sys.stderr)
    return shown.text.strip() != ""
