"""The row about starting the server on a state directory that is set up, and its memory at rest."""

from __future__ import annotations

from bench.processes import pss_mb
from bench.rows import Budget, Row
from bench.server import Server


def measure(server: Server, *, tries: int) -> list[Row]:
    """Stop and start again: from `inn serve` to its report, which ends with a command run in a new room."""
    start = Row("start", "start on a set-up state directory, to a command run in the first room", "s", Budget(3))
    memory = Row("memory", "server at rest, both processes", "MB PSS", Budget(150))
    for _ in range(tries):
        server.stop()
        try:
            start.values.append(server.start())
        except TimeoutError as error:
            start.failures.append(str(error))
            continue
        server.wait_pools()
        memory.values.append(sum(pss_mb(pid) for pid in server.processes().values()))
    memory.note = ", ".join(f"{name} {pss_mb(pid):.0f}" for name, pid in server.processes().items())
    return [start, memory]
