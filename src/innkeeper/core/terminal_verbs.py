"""What terminals ask of a host daemon: programs on a pseudo terminal of a guest, which run on whoever looks at them or does not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import UUID

TERMINAL_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")
SIZE_RANGE = (1, 1_000)
# Of program and arguments together: what Linux takes in one argument, less what the guest puts around it.
COMMAND_BYTES_MAX = 122_880


@dataclass(frozen=True, slots=True)
class StartTerminal:
    """Start a program on a terminal of a ready machine. `name` is unique among the instance's living terminals; without one it is random.

    `programs` are tried in order until one of them is there; they get `env` beside the instance's variables. `label` is what the terminal's row says of it.
    Answer: `{"terminal": {"id", "alive", "exit_code", "cols", "rows", "label", "started_at", "viewers", "offset"}}`.
    Errors: conflict (the name is taken), rate_limited (too many), invalid_request (no such program or directory).
    """

    verb: ClassVar[str] = "terminal.start"
    instance_id: UUID
    programs: tuple[tuple[str, ...], ...]
    label: str
    cols: int
    rows: int
    name: str | None = None
    env: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class ListTerminals:
    """Answer: `{"terminals": [...]}`, as of StartTerminal, oldest first: the living ones, then those of the ended ones that are still kept."""

    verb: ClassVar[str] = "terminal.list"
    instance_id: UUID


@dataclass(frozen=True, slots=True)
class ResizeTerminal:
    """Give a terminal another size. Answer: `{"terminal": ...}`. Errors: terminal_not_found, conflict (it has ended)."""

    verb: ClassVar[str] = "terminal.resize"
    instance_id: UUID
    name: str
    cols: int
    rows: int


@dataclass(frozen=True, slots=True)
class EndTerminal:
    """Hang up on everything in the terminal's session, then kill what is left, and forget the terminal.

    Answer: `{"terminal": ...}`. Errors: terminal_not_found.
    """

    verb: ClassVar[str] = "terminal.end"
    instance_id: UUID
    name: str


@dataclass(frozen=True, slots=True)
class AttachTerminal:
    """Look at a terminal and type into it.

    Streams: MESSAGE `{"offset": int}` first, and again before the DATA wherever bytes are left out; DATA output from `offset` on, or from the oldest byte
    that is kept. The opener sends DATA (typed) and MESSAGE `{"resize": {"cols", "rows"}}`. The answer comes when the program has ended and all
    of its output was sent: `{"exit_code"}`. CANCEL only looks away.
    Errors: terminal_not_found, rate_limited (too many viewers), instance_failed (the program is gone with its machine).
    """

    verb: ClassVar[str] = "terminal.attach"
    instance_id: UUID
    name: str
    offset: int = 0


VERBS: tuple[type[Any], ...] = (StartTerminal, ListTerminals, ResizeTerminal, EndTerminal, AttachTerminal)
