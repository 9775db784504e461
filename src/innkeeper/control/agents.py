"""The catalog of agents: what hosts have recipes of, and which of them can be run now."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from innkeeper.control import images
from innkeeper.control.access import require_any
from innkeeper.core.agent import Agent
from innkeeper.core.image import Image, ImageStatus
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import InnkeeperError

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AgentView:
    """An agent, and why it cannot be run now: None when it can. `image` is then what its instances are made of."""

    agent: Agent
    image: Image | None
    reason: str | None


def views(control: Control) -> list[AgentView]:
    """Every agent that a host has a recipe of, by id. From memory."""
    return [_view(control, agent) for agent in control.agents.every()]


def catalog(control: Control) -> list[Agent]:
    """The agents that can be run now, by id: what the public catalog shows. From memory."""
    return [view.agent for view in views(control) if view.reason is None]


def find(control: Control, agent_id: str) -> AgentView | None:
    """An agent by its id, whether or not it can be run now."""
    agent = control.agents.get(agent_id)
    return None if agent is None else _view(control, agent)


async def list_agents(control: Control, principal: Principal) -> list[AgentView]:
    """Every agent, after hosts were asked: images may have been built beside the server."""
    require_any(principal, Scope.PROFILES, Scope.ROOMS)
    await asyncio.gather(*(_ask(control, host_id) for host_id in control.bus.hosts()))
    return views(control)


async def _ask(control: Control, host_id: UUID) -> None:
    try:
        await images.refresh(control, host_id)
    except InnkeeperError as error:
        log.warning("a host did not say which agents it has", host_id=str(host_id), reason=error.message)


def _view(control: Control, agent: Agent) -> AgentView:
    image = control.images.own(None, agent.id)
    if agent.unavailable is not None:
        return AgentView(agent, image, agent.unavailable)
    if image is None:
        return AgentView(agent, None, f"its image is not built: inn agent build {agent.id}")
    if not image.usable:
        failed = image.status is ImageStatus.FAILED
        return AgentView(
            agent, image, f"its image could not be built: {image.last_error}" if failed else "its image is being built"
        )
    return AgentView(agent, image, None)
