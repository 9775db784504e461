"""What is asked of a host daemon for a program that belongs to whoever runs it: nothing of it is kept, and it ends when its owner goes away.

Executions and terminals (`host_verbs.Execute`, `terminal_verbs`) are kept instead, so that a slow reader may miss the middle of what they say. Here the
program waits for its reader: every byte arrives, which file transfers over its input and output need.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import UUID


@dataclass(frozen=True, slots=True)
class RunProgram:
    """Run a shell line (`command`), or else the first of `programs` that is there, in a ready machine; with `cols` and `rows` on a terminal of its own.

    Streams: MESSAGE `{"started": true}`, then DATA, stderr as channel 2 (a terminal has one output). The opener sends DATA (its input) and
    MESSAGE `{"end": true}` (the end of that, which is not END since orders may follow; nothing to a terminal), `{"signal": int}` (to the process
    group), `{"resize": {"cols", "rows"}}`.
    Answer: `{"exit_code", "signal": int|None}`: on a terminal when the program has ended, else when whatever it left behind has closed the output too.
    CANCEL hangs up (SIGHUP) on everything in the program's session; what ignores that runs on.
    Errors: file_not_found (no such program), invalid_request, rate_limited (too many), instance_not_found, instance_failed.
    """

    verb: ClassVar[str] = "program.run"
    instance_id: UUID
    command: str | None = None
    programs: tuple[tuple[str, ...], ...] = ()
    env: dict[str, str] = field(default_factory=dict, repr=False)
    cols: int | None = None
    rows: int | None = None


VERBS: tuple[type[Any], ...] = (RunProgram,)
