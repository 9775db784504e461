"""Tool schemas of a room, usable verbatim as function tools of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from innkeeper.control import rooms
from innkeeper.control.room_entry import RoomView
from innkeeper.core.token import Principal

if TYPE_CHECKING:
    from innkeeper.control.context import Control


@dataclass(frozen=True, slots=True)
class Tool:
    """One function: `parameters` is a JSON Schema."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RoomTools:
    """A room and the tools that work in it."""

    room: RoomView
    tools: tuple[Tool, ...]


async def describe(control: Control, principal: Principal, profile_id: UUID, room_id: str) -> RoomTools:
    """The tools of an existing room. Raises InstanceNotFoundError."""
    view = await rooms.find(control, principal, profile_id, room_id)
    image = control.images.resolve(principal.organization_id, view.profile.image)
    return RoomTools(view, tools_of(() if image is None else image.tools))


def tools_of(programs: Sequence[str]) -> tuple[Tool, ...]:
    """The tools for rooms of an image, whose descriptions name the programs that it has."""
    has = f" Available in it: {', '.join(programs)}." if programs else ""
    return (
        Tool(
            "execute",
            "Run a shell command in an isolated Linux computer and get its output, exit code and the files it changed. "
            "Files and background processes stay for the next command; the working directory and shell variables do not."
            + has,
            _parameters(command="The shell command to run, for example: ls -la"),
        ),
        Tool(
            "read_file",
            "Read a file of the computer that `execute` runs commands in.",
            _parameters(path="Absolute path of the file, for example: /home/user/report.txt"),
        ),
        Tool(
            "write_file",
            "Write a file of the computer that `execute` runs commands in: it is made or replaced as a whole, and missing directories are made.",
            _parameters(
                path="Absolute path of the file, for example: /home/user/script.py",
                content="The whole content of the file, as text",
            ),
        ),
    )


def _parameters(**descriptions: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            name: {"type": "string", "description": description} for name, description in descriptions.items()
        },
        "required": list(descriptions),
        "additionalProperties": False,
    }
