"""The agent: a program that works for somebody in an instance of its own, as its recipe's `agent.toml` describes it.

    name = "Claude Code"                # what people read
    description = "..."
    prefix = "cl"                       # two letters that subdomains of its instances begin with
    port = 8080                         # TCP port in the guest that its page is served on; absent: it has none
    cpus = 1                            # what an instance gets that asks for nothing else
    memory_mb = 2048
    unavailable = "..."                 # why its image cannot be built; absent: it can be

    [run]
    argv = ["agent-main", "claude"]     # the main process: an instance runs as long as it does
    version = ["claude", "--version"]   # prints the version and ends: what shows that the agent starts
    user = "user"
    workdir = "/workspace"
    model_variable = "ANTHROPIC_MODEL"  # is given a model's `value`; absent: the agent is not told

    [run.env]                           # further variables of the main process
    LANG = "C.UTF-8"

    [volume]                            # outlives stops, and goes with the instance
    size_gb = 5
    mount = "/workspace"

    [health]                            # either a command (exit status 0), run as the user, or a path (HTTP 2xx or 3xx on `port`)
    command = ["true"]
    start_seconds = 60                  # how long after its start failures say nothing

    [keys]                              # per provider: the variable of the main process, and of nothing else, that takes the user's key
    anthropic = "ANTHROPIC_API_KEY"

    [[models]]                          # at least one; each provider has a key's variable
    provider = "anthropic"
    name = "claude-sonnet-4-5"          # what clients say
    label = "Claude Sonnet 4.5"         # what people read
    value = "claude-sonnet-4-5"         # what the agent is told; absent: the name

The same table travels over the bus: whoever gets one parses it again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
PREFIX = re.compile(r"[a-z]{2}")
PROVIDER = re.compile(r"[a-z][a-z0-9-]{0,31}")
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
PATH = re.compile(r"(/[A-Za-z0-9._-]+)+")
URL_PATH = re.compile(r"/[!-~]{0,255}")
MAX_TEXT = 500
MAX_ARGUMENTS = 64
MAX_ENTRIES = 64
MAX_CPUS = 64
MAX_MEMORY_MB = 1_048_576
MAX_VOLUME_GB = 1_024
MAX_START_SECONDS = 3_600
# What the platform itself says in every guest, and what makes a program load other code than its own.
RESERVED_VARIABLES = frozenset({"HOME", "USER", "LOGNAME", "SHELL", "LD_PRELOAD", "LD_LIBRARY_PATH"})
# A volume that is mounted there would hide what the guest stands on.
SYSTEM_DIRECTORIES = frozenset(
    [
        "bin",
        "boot",
        "dev",
        "etc",
        "home",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "proc",
        "root",
        "run",
        "sbin",
        "sys",
        "tmp",
        "usr",
        "var",
        ".innkeeper",
    ]
)


class AgentInvalid(ValueError):  # noqa: N818  # reads as a sentence where it is raised
    """A description of an agent that cannot be used, naming the field and the reason."""

    code = "agent_invalid"


@dataclass(frozen=True, slots=True)
class AgentModel:
    """A model that the agent can be told to use: `name` is what clients say, `value` what the agent is told."""

    provider: str
    name: str
    label: str
    value: str


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How to see that the agent works: `command` (an argv) or `path` (of its page), never both; failures say nothing for `start_seconds`."""

    command: tuple[str, ...] | None
    path: str | None
    start_seconds: int


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent. `id` is also the name of its image. `keys` maps each provider to the variable that takes its key.

    `unavailable` is the reason why there is no image, None where one can be built. Sizes: GiB of the volume, MiB of memory.
    """

    id: str
    name: str
    description: str
    prefix: str
    cpus: int
    memory_mb: int
    argv: tuple[str, ...]
    version_argv: tuple[str, ...]
    user: str
    workdir: str
    volume_gb: int
    volume_mount: str
    health: HealthCheck
    keys: Mapping[str, str]
    models: tuple[AgentModel, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    model_variable: str | None = None
    port: int | None = None
    unavailable: str | None = None

    def model(self, provider: str, name: str) -> AgentModel | None:
        """The model of that provider and name, None where the agent has no such."""
        return next((one for one in self.models if (one.provider, one.name) == (provider, name)), None)

    def environment(self, model: AgentModel, api_key: str) -> dict[str, str]:
        """The variables of the main process: it has a secret in it, and is for that process alone."""
        told = {} if self.model_variable is None else {self.model_variable: model.value}
        return {**self.env, **told, self.keys[model.provider]: api_key}


def parse_agent(agent_id: str, table: Mapping[str, Any]) -> Agent:
    """The agent that a table like the one above describes. Raises AgentInvalid: every field is checked, and unknown ones are refused."""
    if not ID.fullmatch(agent_id):
        raise AgentInvalid(f"not the id of an agent: {agent_id!r}")
    top = _Table(table, "")
    run, volume, health = top.table("run"), top.table("volume"), top.table("health")
    keys = {
        _matching(provider, PROVIDER, "keys"): _variable(name, f"keys.{provider}")
        for provider, name in top.strings("keys").items()
    }
    agent = Agent(
        id=agent_id,
        name=top.text("name"),
        description=top.text("description"),
        prefix=top.matching("prefix", PREFIX),
        cpus=top.number("cpus", 1, MAX_CPUS),
        memory_mb=top.number("memory_mb", 128, MAX_MEMORY_MB),
        argv=run.argv("argv"),
        version_argv=run.argv("version"),
        user=run.matching("user", USER),
        workdir=run.path("workdir"),
        volume_gb=volume.number("size_gb", 1, MAX_VOLUME_GB),
        volume_mount=volume.path("mount"),
        health=_health(health),
        keys=keys,
        models=tuple(_model(one, f"models[{index}]") for index, one in enumerate(top.tables("models"))),
        env={_variable(name, "run.env"): value for name, value in run.strings("env", optional=True).items()},
        model_variable=_variable(run.text("model_variable"), "run.model_variable") if "model_variable" in run else None,
        port=top.number("port", 1, 65_535) if "port" in top else None,
        unavailable=top.text("unavailable") if "unavailable" in top else None,
    )
    for one in (top, run, volume, health):
        one.refuse_unknown()
    _check_whole(agent)
    return agent


def _health(table: _Table) -> HealthCheck:
    if ("command" in table) == ("path" in table):
        raise AgentInvalid("health: needs either 'command' or 'path'")
    return HealthCheck(
        command=table.argv("command") if "command" in table else None,
        path=table.matching("path", URL_PATH) if "path" in table else None,
        start_seconds=table.number("start_seconds", 0, MAX_START_SECONDS),
    )


def _model(raw: Mapping[str, Any], where: str) -> AgentModel:
    table = _Table(raw, where)
    name = table.matching("name", MODEL)
    model = AgentModel(
        provider=table.matching("provider", PROVIDER),
        name=name,
        label=table.text("label"),
        value=table.matching("value", MODEL) if "value" in table else name,
    )
    table.refuse_unknown()
    return model


def _check_whole(agent: Agent) -> None:
    """What no field shows alone."""
    if not agent.models:
        raise AgentInvalid("models: needs at least one")
    named = [(model.provider, model.name) for model in agent.models]
    if twice := [one for one in named if named.count(one) > 1]:
        raise AgentInvalid(f"models: {'/'.join(twice[0])} is there twice")
    providers = {model.provider for model in agent.models}
    if without := sorted(providers - agent.keys.keys()):
        raise AgentInvalid(f"keys: nothing takes the key of {without[0]}")
    if unused := sorted(agent.keys.keys() - providers):
        raise AgentInvalid(f"keys: no model is of {unused[0]}")
    taken = [*agent.env, *({agent.model_variable} - {None}), *set(agent.keys.values())]
    if double := [name for name in taken if taken.count(name) > 1]:
        raise AgentInvalid(f"run: {double[0]} has two meanings")
    if agent.health.path is not None and agent.port is None:
        raise AgentInvalid("health: a 'path' needs a 'port'")
    if agent.volume_mount.split("/")[1] in SYSTEM_DIRECTORIES:
        raise AgentInvalid(f"volume.mount: {agent.volume_mount} is of the system")


def _variable(name: str, where: str) -> str:
    _matching(name, VARIABLE, where)
    if name in RESERVED_VARIABLES:
        raise AgentInvalid(f"{where}: {name} is the platform's")
    return name


def _matching(value: str, pattern: re.Pattern[str], where: str) -> str:
    if not pattern.fullmatch(value):
        raise AgentInvalid(f"{where}: not allowed: {value!r}")
    return value


class _Table:
    """A table that is read field by field, and knows which were asked for."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = raw
        self._where = where
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        self._asked.add(key)
        return key in self._raw

    def _name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _get(self, key: str, kind: type, kind_name: str) -> Any:
        self._asked.add(key)
        if key not in self._raw:
            raise AgentInvalid(f"{self._name(key)}: is missing")
        value = self._raw[key]
        # True is an int to Python, and 1 is not a flag to us.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise AgentInvalid(f"{self._name(key)}: is no {kind_name}")
        return value

    def text(self, key: str) -> str:
        value: str = self._get(key, str, "text")
        if not 0 < len(value) <= MAX_TEXT or not value.isprintable():
            raise AgentInvalid(f"{self._name(key)}: 1 to {MAX_TEXT} characters in one line")
        return value

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        return _matching(self._get(key, str, "text"), pattern, self._name(key))

    def path(self, key: str) -> str:
        value = self.matching(key, PATH)
        if {".", ".."} & set(value.split("/")):
            raise AgentInvalid(f"{self._name(key)}: not allowed: {value!r}")
        return value

    def number(self, key: str, least: int, most: int) -> int:
        value: int = self._get(key, int, "whole number")
        if not least <= value <= most:
            raise AgentInvalid(f"{self._name(key)}: {least} to {most}")
        return value

    def argv(self, key: str) -> tuple[str, ...]:
        value = self._get(key, list, "list")
        good = all(isinstance(word, str) and 0 < len(word) <= MAX_TEXT and word.isprintable() for word in value)
        if not good or not 0 < len(value) <= MAX_ARGUMENTS:
            raise AgentInvalid(f"{self._name(key)}: 1 to {MAX_ARGUMENTS} words")
        return tuple(value)

    def strings(self, key: str, *, optional: bool = False) -> Mapping[str, str]:
        if key not in self and optional:
            return {}
        value: Mapping[str, str] = self._get(key, dict, "table")
        good = all(isinstance(one, str) and len(one) <= MAX_TEXT and "\0" not in one for one in value.values())
        if not good or len(value) > MAX_ENTRIES:
            raise AgentInvalid(f"{self._name(key)}: a table of at most {MAX_ENTRIES} short strings")
        return value

    def table(self, key: str) -> _Table:
        return _Table(self._get(key, dict, "table"), self._name(key))

    def tables(self, key: str) -> list[Mapping[str, Any]]:
        value: list[Mapping[str, Any]] = self._get(key, list, "list of tables")
        if len(value) > MAX_ENTRIES or not all(isinstance(one, dict) for one in value):
            raise AgentInvalid(f"{self._name(key)}: is no list of at most {MAX_ENTRIES} tables")
        return value

    def refuse_unknown(self) -> None:
        if unknown := sorted(map(str, self._raw.keys() - self._asked)):
            raise AgentInvalid(f"{self._name(unknown[0])}: is not known")
