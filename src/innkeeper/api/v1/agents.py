"""Agents under `/v1/agents`."""

from __future__ import annotations

from fastapi import APIRouter

from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.v1.schemas import AgentAnswer, AgentModelAnswer
from innkeeper.control import agents
from innkeeper.control.agents import AgentView
from innkeeper.control.context import Control


def add_agent_routes(router: APIRouter, control: Control) -> None:
    """Add the route."""

    @router.get("/v1/agents")
    async def list_agents(principal: CurrentPrincipal) -> list[AgentAnswer]:
        """Every agent that a host has a recipe of, by id, with the reason where it cannot be run."""
        return [agent_answer(view) for view in await agents.list_agents(control, principal)]


def agent_answer(view: AgentView) -> AgentAnswer:
    """The agent as this format shows it."""
    agent = view.agent
    return AgentAnswer(
        id=agent.id,
        name=agent.name,
        description=agent.description,
        available=view.reason is None,
        reason=view.reason,
        image_digest="" if view.image is None else view.image.digest,
        cpus=agent.cpus,
        memory_mb=agent.memory_mb,
        volume_gb=agent.volume_gb,
        volume_mount=agent.volume_mount,
        port=agent.port,
        models=[AgentModelAnswer(provider=one.provider, name=one.name, label=one.label) for one in agent.models],
    )
