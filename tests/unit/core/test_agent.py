"""Descriptions of agents: those that come with the server are read, and each wrong one is refused with the field's name."""

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from innkeeper.core.agent import AgentInvalid, AgentModel, parse_agent

AGENTS = Path(__file__).parents[3] / "images" / "agents"
WHOLE = {
    "name": "Tester",
    "description": "Tests.",
    "prefix": "te",
    "port": 8080,
    "cpus": 1,
    "memory_mb": 512,
    "run": {
        "argv": ["tester", "run"],
        "version": ["tester", "--version"],
        "user": "user",
        "workdir": "/workspace",
        "model_variable": "TESTER_MODEL",
        "env": {"QUIET": "1"},
    },
    "volume": {"size_gb": 5, "mount": "/workspace"},
    "health": {"path": "/health", "start_seconds": 30},
    "keys": {"anthropic": "ANTHROPIC_API_KEY"},
    "models": [{"provider": "anthropic", "name": "claude", "label": "Claude", "value": "anthropic/claude"}],
}
GONE = object()


def changed(path: str, value: Any) -> dict[str, Any]:
    """WHOLE with the value at a dotted path replaced, added, or taken away."""
    table: Any = copy.deepcopy(WHOLE)
    *parents, last = path.split(".")
    inner = table
    for part in parents:
        inner = inner[int(part)] if part.isdigit() else inner[part]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return dict(table)


def test_what_a_description_says_is_what_an_instance_gets() -> None:
    agent = parse_agent("tester", WHOLE)
    assert (agent.id, agent.name, agent.prefix, agent.port) == ("tester", "Tester", "te", 8080)
    assert (agent.argv, agent.version_argv) == (("tester", "run"), ("tester", "--version"))
    assert (agent.volume_gb, agent.volume_mount, agent.workdir) == (5, "/workspace", "/workspace")
    assert (agent.health.path, agent.health.command, agent.health.start_seconds) == ("/health", None, 30)
    assert agent.unavailable is None
    model = agent.model("anthropic", "claude")
    assert model == AgentModel("anthropic", "claude", "Claude", "anthropic/claude")
    assert agent.model("openai", "claude") is None
    assert agent.environment(model, "secret") == {
        "QUIET": "1",
        "TESTER_MODEL": "anthropic/claude",
        "ANTHROPIC_API_KEY": "secret",
    }


def test_a_model_is_told_by_its_name_where_it_has_no_value_and_only_where_the_agent_takes_it() -> None:
    table = changed("models.0.value", GONE)
    assert parse_agent("tester", table).models[0].value == "claude"
    del table["run"]["model_variable"]
    agent = parse_agent("tester", table)
    assert agent.environment(agent.models[0], "k") == {"QUIET": "1", "ANTHROPIC_API_KEY": "k"}


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("name", GONE, "name: is missing"),
        ("name", "two\nlines", "name: 1 to 500"),
        ("prefix", "tes", "prefix: not allowed"),
        ("cpus", True, "cpus: is no whole number"),
        ("cpus", 0, "cpus: 1 to 64"),
        ("memory_mb", "512", "memory_mb: is no whole number"),
        ("port", 65_536, "port: 1 to 65535"),
        ("unavailable", "", "unavailable: 1 to 500"),
        ("nmae", "x", "nmae: is not known"),
        ("run.argv", [], "run.argv: 1 to 64 words"),
        ("run.argv", "tester", "run.argv: is no list"),
        ("run.argv", ["a", 1], "run.argv: 1 to 64 words"),
        ("run.version", GONE, "run.version: is missing"),
        ("run.user", "0", "run.user: not allowed"),
        ("run.workdir", "workspace", "run.workdir: not allowed"),
        ("run.workdir", "/a/../etc", "run.workdir: not allowed"),
        ("run.shell", "x", "run.shell: is not known"),
        ("run.env", {"A-B": "1"}, "run.env: not allowed"),
        ("run.env", {"LD_PRELOAD": "/x.so"}, "LD_PRELOAD is the platform's"),
        ("run.env", {"ANTHROPIC_API_KEY": "x"}, "ANTHROPIC_API_KEY has two meanings"),
        ("run.model_variable", "ANTHROPIC_API_KEY", "ANTHROPIC_API_KEY has two meanings"),
        ("volume.size_gb", 0, "volume.size_gb: 1 to 1024"),
        ("volume.mount", "/etc/tester", "is of the system"),
        ("volume.mount", "/.innkeeper", "is of the system"),
        ("volume.mount", "/", "volume.mount: not allowed"),
        ("volume.kind", "x", "volume.kind: is not known"),
        ("health", {"start_seconds": 1}, "either 'command' or 'path'"),
        ("health.command", ["true"], "either 'command' or 'path'"),
        ("health.every", 1, "health.every: is not known"),
        ("port", GONE, "a 'path' needs a 'port'"),
        ("keys", {}, "nothing takes the key of anthropic"),
        ("keys.openai", "OPENAI_API_KEY", "no model is of openai"),
        ("keys.anthropic", "HOME", "HOME is the platform's"),
        ("models", [], "needs at least one"),
        ("models", [WHOLE["models"][0]] * 2, "anthropic/claude is there twice"),  # type: ignore[index]
        ("models", ["claude"], "is no list of"),
        ("models.0.name", "-c", r"models\[0\].name: not allowed"),
        ("models.0.price", 1, r"models\[0\].price: is not known"),
    ],
)
def test_a_wrong_description_is_refused_with_the_field(path: str, value: Any, reason: str) -> None:
    with pytest.raises(AgentInvalid, match=reason):
        parse_agent("tester", changed(path, value))


@pytest.mark.parametrize("agent_id", ["", "../base", "Tester", "-x", "x-", "a" * 41])
def test_an_id_is_the_name_of_a_folder_and_of_an_image(agent_id: str) -> None:
    with pytest.raises(AgentInvalid, match="not the id"):
        parse_agent(agent_id, WHOLE)


@pytest.mark.parametrize("name", sorted(path.name for path in AGENTS.iterdir()))
def test_every_agent_that_comes_with_the_server_is_described(name: str) -> None:
    assert parse_agent(name, tomllib.loads((AGENTS / name / "agent.toml").read_text())).id == name


def test_the_five_of_the_catalog_have_prefixes_of_their_own() -> None:
    found = [parse_agent(path.name, tomllib.loads((path / "agent.toml").read_text())) for path in AGENTS.iterdir()]
    assert sorted(agent.id for agent in found) == ["aider", "browser-use", "claude-code", "hermes", "openclaw"]
    assert len({agent.prefix for agent in found}) == len(found)
