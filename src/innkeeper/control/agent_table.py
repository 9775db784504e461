"""The agents in memory, as hosts report them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import structlog

from innkeeper.core.agent import Agent, AgentInvalid, parse_agent

log = structlog.get_logger(__name__)


class AgentTable:
    """Every agent that a host has a recipe of."""

    def __init__(self) -> None:
        self._by_id: dict[str, Agent] = {}

    def every(self) -> list[Agent]:
        """All of them, by id."""
        return [agent for _, agent in sorted(self._by_id.items())]

    def get(self, agent_id: str) -> Agent | None:
        """The agent of that id, or None."""
        return self._by_id.get(agent_id)

    def take(self, host_id: UUID, reports: object) -> None:
        """Remember what a host says that it has recipes of; what makes no sense is left out."""
        for report in reports if isinstance(reports, list) else ():
            try:
                agent = _agent_of(report)
            except AgentInvalid as error:
                log.warning("a host reported an agent that makes no sense", host_id=str(host_id), reason=str(error))
            else:
                self._by_id[agent.id] = agent


def _agent_of(report: Any) -> Agent:
    if not isinstance(report, dict) or not isinstance(report.get("table"), dict):
        raise AgentInvalid("no id with a table")
    return parse_agent(str(report.get("id")), report["table"])
