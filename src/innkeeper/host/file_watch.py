"""What changes in a guest's tree, as its agent tells it: lines that are checked one by one, at a pace that one watch may not exceed."""

from __future__ import annotations

import json
from typing import Any

from innkeeper.bus.contract import Data, Message, ServerCall
from innkeeper.core.tree_verbs import WatchTree
from innkeeper.errors import GuestError, RateLimitedError
from innkeeper.host.files import checked_number
from innkeeper.host.machine import Machine
from innkeeper.host.output_pace import OutputPace
from innkeeper.host.wire_paths import absolute_path, guest_path, path_param
from innkeeper.wire.frames import ProtocolError, parse_object

WATCHES_PER_GUEST = 8
# Two paths of 4 KiB, each of their bytes written as six.
LINE_BYTES = 65_536
# Of one watch: about 3,000 events a second, which cost the event loop 3 %. What a guest does beyond that it tells as lost.
BYTES_PER_SECOND = 262_144
BYTES_AT_ONCE = 1_048_576
_TYPES = ("created", "modified", "deleted", "moved")


async def watch_tree(machine: Machine, request: WatchTree, call: ServerCall) -> dict[str, Any]:
    """See WatchTree."""
    params = {**path_param(guest_path(request.path)), "recursive": request.recursive}
    if machine.watches >= WATCHES_PER_GUEST:
        raise RateLimitedError(f"{WATCHES_PER_GUEST} watches of this instance are open already", retry_after_seconds=5)
    machine.watches += 1
    try:
        async with machine.in_use():
            stream = await machine.endpoint.open("watch", params)
            try:
                pace = OutputPace(bytes_per_second=BYTES_PER_SECOND, bytes_at_once=BYTES_AT_ONCE)
                lines = Lines()
                begun = False
                while (event := await stream.next_event()) is not None:
                    if isinstance(event, Message) and not begun:
                        begun = True
                        await call.send_message({"directories": checked_number(event.body.get("directories"))})
                    elif isinstance(event, Data):
                        checked = lines.take(event.data)
                        if checked:
                            await call.send_data(checked)
                        await pace.take(len(event.data))
                return {}
            finally:
                stream.cancel()
    finally:
        machine.watches -= 1


class Lines:
    """Puts lines together from pieces, and says them again with nothing in them but what belongs there."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def take(self, data: bytes) -> bytes:
        """The lines that are whole by now. Raises GuestError for what is no event."""
        # What is kept is not looked at again for each of many small pieces.
        if b"\n" not in data:
            self._rest += data
            whole: list[bytes] = []
        else:
            first, *others, last = data.split(b"\n")
            whole = [bytes(self._rest + first), *others]
            self._rest = bytearray(last)
        if len(self._rest) > LINE_BYTES:
            raise GuestError("The guest agent sent no valid event")
        return b"".join(_checked(line) for line in whole)


def _checked(line: bytes) -> bytes:
    try:
        event = parse_object(line)
    except ProtocolError as error:
        raise GuestError("The guest agent sent no valid event") from error
    kind = event.get("type")
    if kind == "overflow":
        return b'{"type":"overflow"}\n'
    if kind not in _TYPES:
        raise GuestError("The guest agent sent no valid event")
    moved = {"path": event.get("from"), "path_b64": event.get("from_b64")}
    checked = {
        "type": kind,
        "path": absolute_path(event),
        "from": absolute_path(moved) if kind == "moved" else None,
        "directory": event.get("directory") is True,
    }
    return json.dumps(checked, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
