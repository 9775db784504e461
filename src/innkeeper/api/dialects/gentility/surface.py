"""The Gentility dialect as one ASGI application: room endpoints by hand (hot, streaming, raw paths), the rest through FastAPI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from innkeeper.api.dialects.gentility import commands, files, rooms
from innkeeper.api.dialects.gentility.room_call import RoomCall
from innkeeper.api.dialects.gentility.room_path import ROOM, parse_room_path
from innkeeper.api.edge import ROUTE
from innkeeper.api.errors import MethodNotAllowedError
from innkeeper.api.json_app import Authenticate
from innkeeper.api.raw_path import raw_path
from innkeeper.control.context import Control

Handler = Callable[[RoomCall], Awaitable[None]]

ROUTES: Mapping[str, Mapping[str, Handler]] = {
    ROOM: {"POST": rooms.get_or_create, "DELETE": rooms.destroy},
    f"{ROOM}/command": {"POST": commands.run_command},
    f"{ROOM}/command/{{execution_id}}/output": {"GET": commands.read_output},
    f"{ROOM}/command/{{execution_id}}/files_changed": {"GET": commands.read_files_changed},
    f"{ROOM}/file/{{path}}": {"GET": files.read_file, "PUT": files.write_file},
    f"{ROOM}/files/{{path}}": {"GET": files.list_files},
    f"{ROOM}/tools": {"GET": rooms.tools},
}


class GentilitySurface:
    """`/api/...`: every request carries a bearer token."""

    def __init__(self, control: Control, json_app: ASGIApp, authenticate: Authenticate) -> None:
        self._control = control
        self._json_app = json_app
        self._authenticate = authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; errors are raised, the edge answers them."""
        path = parse_room_path(raw_path(scope))
        if path is None:
            await self._json_app(scope, receive, send)
            return
        scope[ROUTE] = path.route
        principal = await self._authenticate(scope)
        methods = ROUTES[path.route]
        handler = methods.get(scope["method"])
        if handler is None:
            raise MethodNotAllowedError(methods)
        await handler(
            RoomCall(
                control=self._control,
                principal=principal,
                profile_id=path.profile_id(),
                room_id=path.room_id(),
                rest=path.rest,
                scope=scope,
                receive=receive,
                send=send,
            )
        )
