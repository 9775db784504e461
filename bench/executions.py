"""Rows about code and programs in a VM: a cell of a running interpreter, the first one of a session, a program without a shell."""

from __future__ import annotations

import time

from bench.rows import Row
from bench.server import Server

PACE_SECONDS = 0.1
WARM_UP = 3


def measure(server: Server, *, tries: int) -> list[Row]:
    """Over HTTP, 100 ms apart, file changes included. What a session's interpreter costs is the first cell less a later one."""
    cell = Row("cell", "a Python cell in a session's interpreter (`/execute`)")
    first = Row("first-cell", "the first cell of a session whose VM is up: its interpreter starts")
    shell = Row("execute-bash", "`true` as bash (`/execute`), outputs apart")
    program = Row("exec-argv", "`/bin/true` without a shell (`/v1/vms/{vm_id}/exec`), outputs apart")
    vm = server.request("POST", "/v1/vms", {})
    of = {"vm_id": vm["vm_id"]}
    rows = (
        (cell, "/execute", {**of, "code": "x = 1"}),
        (shell, "/execute", {**of, "code": "true", "language": "bash"}),
        (program, f"/v1/vms/{vm['vm_id']}/exec", {"argv": ["/bin/true"]}),
    )
    for _ in range(WARM_UP):
        for _, path, body in rows:
            server.request("POST", path, body)
    for _ in range(tries):
        for row, path, body in rows:
            time.sleep(PACE_SECONDS)
            row.take(lambda path=path, body=body: server.request("POST", path, body))  # type: ignore[misc]
    for _ in range(max(3, tries // 4)):
        # An interpreter that is gone is what a new session begins with.
        server.request("POST", "/execute", {**of, "code": "import os; os._exit(0)"})
        time.sleep(PACE_SECONDS)
        first.take(lambda: server.request("POST", "/execute", {**of, "code": "x = 1"}))
    server.request("DELETE", f"/v1/vms/{vm['vm_id']}")
    return [cell, first, shell, program]
