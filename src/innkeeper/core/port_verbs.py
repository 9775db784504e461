"""What the API process asks of a host daemon about a guest's TCP ports; carried like `core.host_verbs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import UUID

# What either end of a connection lets the other send ahead, beside the bus's own window: without it each piece of a large body waits for the word
# that the one before was read.
SEND_AHEAD_BYTES = 262_144


@dataclass(frozen=True, slots=True)
class DialPort:
    """Connect to a TCP port of a ready guest over its link: to its loopback, or to an address of its own. No network is involved.

    Streams: MESSAGE `{"connected": true}`, then DATA both ways; END either way is a half close. The opener may send DATA at once.
    Answer: `{}` when both sides have closed. CANCEL hangs up. Errors: port_unreachable, guest_error (a reset), instance_not_found, instance_failed.
    """

    verb: ClassVar[str] = "port.dial"
    instance_id: UUID
    port: int


@dataclass(frozen=True, slots=True)
class ListPorts:
    """The TCP ports that something in a guest listens on, as the guest tells it, sorted; at most 500.

    Answer: `{"ports": [{"port": int, "address": str, "pid": int|None, "command": str|None}]}`.
    """

    verb: ClassVar[str] = "port.list"
    instance_id: UUID


VERBS: tuple[type[Any], ...] = (DialPort, ListPorts)
