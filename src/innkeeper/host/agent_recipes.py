"""The agents whose recipes came with the server."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import structlog

from innkeeper.core.agent import Agent, AgentInvalid, parse_agent
from innkeeper.host.disks.image_recipe import AGENT_DESCRIPTION, AGENTS

log = structlog.stdlib.get_logger(__name__)


def load_agent(folder: Path) -> tuple[Agent, dict[str, Any]]:
    """The agent of a recipe's folder, and the table that describes it. Raises AgentInvalid, naming the file."""
    path = folder / AGENT_DESCRIPTION
    try:
        table = tomllib.loads(path.read_text())
        return parse_agent(folder.name, table), table
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, AgentInvalid) as error:
        raise AgentInvalid(f"{path}: {error}") from error


def load_agents(recipes: Path) -> dict[str, tuple[Agent, dict[str, Any]]]:
    """By id, every agent below the folder of recipes with its table. One that cannot be read is logged and left out: the others work."""
    found = {}
    for path in sorted(recipes.glob(f"{AGENTS}/*/{AGENT_DESCRIPTION}")):
        try:
            found[path.parent.name] = load_agent(path.parent)
        except AgentInvalid as error:
            log.error("agent left out", reason=str(error))
    return found
