"""The catalog: what hosts say of agents is checked, and an agent is listed as one that can be run only when its image is there."""

import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest

from innkeeper.control import agents
from innkeeper.control.agent_table import AgentTable
from innkeeper.control.context import Control
from innkeeper.control.image_table import ImageTable
from innkeeper.core.image import Image, ImageSource, ImageStatus

DESCRIPTION = Path(__file__).parents[3] / "images" / "agents" / "claude-code" / "agent.toml"
HOST = uuid4()
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Tables:
    """What the catalog reads of the control side."""

    def __init__(self) -> None:
        self.agents = AgentTable()
        self.images = ImageTable()


def report(agent_id: str = "claude-code", **changes: Any) -> dict[str, Any]:
    return {"id": agent_id, "table": tomllib.loads(DESCRIPTION.read_text()) | changes}


def image(status: ImageStatus, digest: str = "", last_error: str | None = None, **more: Any) -> Image:
    fields: dict[str, Any] = {"organization_id": None, "name": "claude-code", "source": ImageSource.SHIPPED} | more
    return Image(
        id=uuid4(), status=status, created_at=NOW, updated_at=NOW, digest=digest, last_error=last_error, **fields
    )


@pytest.fixture
def tables() -> Tables:
    return Tables()


def reason(tables: Tables) -> str | None:
    found = agents.find(cast("Control", tables), "claude-code")
    assert found is not None
    return found.reason


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (None, "not built: inn agent build claude-code"),
        (image(ImageStatus.MISSING), "is being built"),
        (image(ImageStatus.BUILDING), "is being built"),
        (image(ImageStatus.FAILED, last_error="no npm here"), "could not be built: no npm here"),
        (image(ImageStatus.READY, "d", organization_id=uuid4()), "not built"),
    ],
)
def test_an_agent_without_an_image_of_the_servers_own_is_in_no_catalog(
    tables: Tables, found: Image | None, why: str
) -> None:
    tables.agents.take(HOST, [report()])
    if found is not None:
        tables.images.put(found)
    assert why in (reason(tables) or "")
    assert agents.catalog(cast("Control", tables)) == []


@pytest.mark.parametrize("status", [ImageStatus.READY, ImageStatus.BUILDING, ImageStatus.FAILED])
def test_an_agent_whose_image_is_there_is_in_the_catalog_while_that_is_made_anew(
    tables: Tables, status: ImageStatus
) -> None:
    tables.agents.take(HOST, [report()])
    tables.images.put(image(status, "d"))
    assert reason(tables) is None
    assert [agent.id for agent in agents.catalog(cast("Control", tables))] == ["claude-code"]


def test_an_agent_that_its_recipe_calls_unavailable_is_so_whatever_images_there_are(tables: Tables) -> None:
    tables.agents.take(HOST, [report(unavailable="its installer fetches a program from elsewhere")])
    tables.images.put(image(ImageStatus.READY, "d"))
    assert reason(tables) == "its installer fetches a program from elsewhere"
    assert agents.catalog(cast("Control", tables)) == []


@pytest.mark.parametrize(
    "bad",
    [None, 1, {}, {"id": "x"}, {"id": "../x", "table": {}}, {"id": "x", "table": []}, report("X"), report(cpus="many")],
)
def test_what_makes_no_sense_is_left_out_and_the_rest_is_taken(tables: Tables, bad: Any) -> None:
    tables.agents.take(HOST, [bad, report(), bad])
    assert [agent.id for agent in tables.agents.every()] == ["claude-code"]
    tables.agents.take(HOST, bad)
    assert [agent.id for agent in tables.agents.every()] == ["claude-code"]
    assert agents.find(cast("Control", tables), "x") is None
