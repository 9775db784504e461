"""The host: a machine that runs guests, as the control side sees it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Host:
    """A machine that runs guests. Sizes in MiB; `draining` hosts take no new instances."""

    id: UUID
    name: str
    address: str = "local"
    draining: bool = False
