"""The host: a machine that runs guests, as the control side sees it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Host:
    """A machine that runs guests.

    A `draining` host takes no new instances; its rooms go on, after `drain_deadline` only with what they were doing then. None: without an end.
    """

    id: UUID
    name: str
    address: str = "local"
    draining: bool = False
    drain_deadline: datetime | None = None

    def refuses_use(self, now: datetime) -> bool:
        """Whether the host's rooms take nothing more."""
        return self.draining and self.drain_deadline is not None and now >= self.drain_deadline
