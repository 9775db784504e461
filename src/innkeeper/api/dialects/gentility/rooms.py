"""Rooms: get or create, destroy, and the tools that a model can be given."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from innkeeper.api.body import read_json_body
from innkeeper.api.dialects.gentility.room_call import RoomCall
from innkeeper.api.dialects.gentility.schemas import RoomRequest, show_state
from innkeeper.api.disconnect import cancelled_on_disconnect
from innkeeper.api.errors import validate_json
from innkeeper.control import rooms as control_rooms
from innkeeper.control import tools as control_tools

ROOM_BODY_MAX_BYTES = 64 << 10


async def get_or_create(call: RoomCall) -> None:
    """POST .../room/{room_id}."""
    body = await read_json_body(call.scope, call.receive, max_bytes=ROOM_BODY_MAX_BYTES)
    request = validate_json(RoomRequest, body) if body.strip() else RoomRequest()
    async with cancelled_on_disconnect(call.receive):
        room = await control_rooms.get_or_create(
            call.control, call.principal, call.profile_id, call.room_id, host_id=request.host_id
        )
    answer: dict[str, Any] = {
        "instance_id": str(room.instance.public_id),
        "profile_id": str(call.profile_id),
        "room_id": call.room_id,
        "status": show_state(room.instance.state),
    }
    if room.host is not None:
        answer["host"] = {"id": str(room.host.id), "name": room.host.name}
    answer["profile"] = {"id": str(room.profile.id), "name": room.profile.name}
    await JSONResponse(answer)(call.scope, call.receive, call.send)


async def destroy(call: RoomCall) -> None:
    """DELETE .../room/{room_id}: 204 when the guest no longer runs."""
    await control_rooms.destroy(call.control, call.principal, call.profile_id, call.room_id)
    await Response(status_code=204)(call.scope, call.receive, call.send)


async def tools(call: RoomCall) -> None:
    """GET .../tools."""
    described = await control_tools.describe(call.control, call.principal, call.profile_id, call.room_id)
    instance = described.room.instance
    answer = {
        "profile_id": str(call.profile_id),
        "room_id": call.room_id,
        "instance_id": str(instance.public_id),
        "instance_status": show_state(instance.state),
        "tools": [
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
            for tool in described.tools
        ],
    }
    await JSONResponse(answer)(call.scope, call.receive, call.send)
