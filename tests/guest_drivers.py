"""The drivers that the same tests run their guests with: a server of each, and whoever asks for `driver` runs once with each."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from server_fixture import Server

GVISOR, QEMU = "gvisor", "qemu"
VM_USER = "innkeeper-vm"
# How a server's guests get a driver. Without hardware virtualization a microVM is worth nothing by the server's own rules, which tests may overrule.
SETTINGS = {
    GVISOR: {"INNKEEPER_DRIVER": GVISOR, "INNKEEPER_RUNSC_PLATFORM": "systrap"},
    QEMU: {
        "INNKEEPER_DRIVER": QEMU,
        "INNKEEPER_RUNSC_PLATFORM": "systrap",
        "INNKEEPER_TCG_COUNTS_AS_MICROVM": "true",
        # Who waits for a guest waits until it is there: on a busy machine it boots in more than half a minute.
        "INNKEEPER_ROOM_WAIT_SECONDS": "120",
    },
}


def missing(driver: str) -> str | None:
    """Why nothing can be run with it here."""
    if os.geteuid() != 0:
        return "needs root"
    if driver == GVISOR:
        return None if shutil.which("runsc") else "needs runsc"
    if os.uname().machine != "x86_64" or shutil.which("qemu-system-x86_64") is None:
        return "needs QEMU for x86_64"
    if VM_USER not in {user.pw_name for user in pwd.getpwall()}:
        return f"needs the user {VM_USER}"
    return None


def values(definition: pytest.Item | pytest.Function) -> list[object]:
    """The drivers of a test that asks for one.

    Every test runs with gVisor; with microVMs those that are marked `microvms` do, the others in the long run only, since a guest whose instructions are
    translated is many times slower. What tells of gVisor alone is marked `gvisor_only`.
    """
    drivers = [GVISOR] if definition.get_closest_marker("gvisor_only") else [GVISOR, QEMU]
    if definition.get_closest_marker("microvms_only"):
        drivers = [QEMU]
    chosen = definition.get_closest_marker("microvms") or definition.get_closest_marker("microvms_only")
    return [
        pytest.param(driver, id=driver, marks=[] if driver == GVISOR or chosen else [pytest.mark.long])
        for driver in drivers
    ]


class Servers:
    """One running server per driver, each begun when a test first asks for it, so that tests of one file may alternate."""

    def __init__(self, start: Callable[[str], AbstractContextManager[Server]]) -> None:
        self._start = start
        self._running: dict[str, Server] = {}
        self._stack = contextlib.ExitStack()

    def __getitem__(self, driver: str) -> Server:
        if driver not in self._running:
            self._running[driver] = self._stack.enter_context(self._start(driver))
        return self._running[driver]

    @classmethod
    @contextlib.contextmanager
    def started_by(cls, start: Callable[[str], AbstractContextManager[Server]]) -> Iterator[Servers]:
        """Servers that `start(driver)` makes; all of them end."""
        made = cls(start)
        with made._stack:
            yield made
