"""What the API process asks of a host daemon about the logs of instances; carried like `core.host_verbs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import UUID

# Of one answer, and of one wait.
LINES_MAX = 1_000
WAIT_SECONDS_MAX = 30.0


@dataclass(frozen=True, slots=True)
class ReadLog:
    """The lines of an instance's log after the sequence `after`, whether the instance runs or not; with `newest` none but that many of the newest.

    Where there is none it waits for one, at most `wait_seconds`, or until the log is removed. At most `limit` lines come at once, fewer where they are long.
    Answer: `{"lines": [LogLine.to_wire()], "first": int, "last": int}`, the sequences of the oldest and newest line that are kept; `last` is 0 of no log.
    """

    verb: ClassVar[str] = "log.read"
    instance_id: UUID
    after: int = 0
    newest: int | None = None
    limit: int = LINES_MAX
    wait_seconds: float = 0.0


VERBS: tuple[type[Any], ...] = (ReadLog,)
