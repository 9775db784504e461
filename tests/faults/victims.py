"""`kill -9` of a part of a running server, and what whoever watches over it does then."""

from __future__ import annotations

import contextlib
import os
import random
import signal

import httpx2
from server_fixture import Server, until
from tests.faults import census
from tests.guest_drivers import GVISOR, QEMU

SERVERS = ("api", "daemon", "both")
VICTIMS = {GVISOR: (*SERVERS, "sandbox", "gofer", "runsc"), QEMU: (*SERVERS, "vm")}


def kill(running: Server, victim: str, chance: random.Random) -> list[int]:
    """`kill -9`; the pids."""
    assert running.process is not None
    if victim not in SERVERS:
        name = "" if victim == "runsc" else victim
        found = census.vm_pids(running.home) if victim == "vm" else census.runsc_pids(running.home, name)
        pids = [chance.choice(found)] if found else []
    else:
        pids = [running.api_pid()] if victim != "daemon" else []
        pids += [running.process.pid] if victim != "api" else []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def come_back(running: Server, victim: str) -> None:
    """What whoever watches over a server does: start it again at once. An API process is started again by its daemon."""
    if victim in ("daemon", "both"):
        running.died()
        running.start()
    elif victim == "api":
        until(lambda: healthy(running))


def healthy(running: Server) -> bool:
    try:
        return running.client(token=None).get("/healthz").status_code == 200
    except httpx2.TransportError:
        return False
