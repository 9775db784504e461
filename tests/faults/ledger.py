"""Books of what a client was told: what was acknowledged must be there after any fault, what was not may be there as a whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import httpx2
from server_fixture import Room

# What a client that repeats its request gives a server that says "not now".
PATIENCE_SECONDS = 90.0
# The sums of everything in the home directory, however many files there are.
SUMS = "find . -maxdepth 1 -type f -name '[mf]-*' -printf '%f\\0' | xargs -0r sha256sum"


class Standing(Enum):
    """What a client knows of a room."""

    ASKED = "asked for, without an answer"
    THERE = "there"
    DOOMED = "its destruction was asked for, without an answer"
    GONE = "destroyed"


@dataclass
class RoomBook:
    """One room: which instance it is, the digests that each file may have (None: absent), and its executions."""

    profile_id: str
    room_id: str
    standing: Standing = Standing.ASKED
    instance_id: str | None = None
    files: dict[str, set[str | None]] = field(default_factory=dict)
    # Files that were written since the guest last put all of them on its disk.
    unsynced: set[str] = field(default_factory=set)
    # Those of them that a guest which lost its power may have in any form, or not at all.
    unsure: set[str] = field(default_factory=set)
    # Execution id -> (output, exit code, rows of changes) as answered.
    told: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    # Execution id -> the output that it has if it came to its end; no answer came.
    cut: dict[str, str] = field(default_factory=dict)

    def room(self, client: httpx2.Client) -> Room:
        """The room, as a client of now reaches it."""
        return Room(client, self.profile_id, self.room_id)

    def writing(self, name: str, digest: str) -> None:
        """A file is about to be written."""
        self.files.setdefault(name, {None}).add(digest)
        self.unsynced.add(name)

    def lost_power(self) -> None:
        """The guest's own kernel may be gone, with what it had not written to its disk yet."""
        self.unsure |= self.unsynced

    def sync(self, client: httpx2.Client) -> list[str]:
        """Put what was written on the guest's disk, where no end of the guest takes it."""
        if self.standing is Standing.GONE:
            return []
        answer = patiently(lambda: self.room(client).post("sync"))
        if answer.status_code != 200 or answer.json()["result"]["exit_code"] != 0:
            return [f"{self.room_id}: sync answered {answer.status_code} {answer.text}"]
        self.unsynced.clear()
        return []

    def audit(self, client: httpx2.Client) -> list[str]:
        """Compare with what the server has, and settle what was open. One line per discrepancy."""
        if self.standing is Standing.GONE:
            return []
        room, wrong = self.room(client), []
        answer = patiently(lambda: room.client.post(room.path))
        if answer.status_code != 200:
            return [f"{self.room_id} ({self.standing.value}) does not come up: {answer.status_code} {answer.text}"]
        instance = answer.json()["instance_id"]
        if self.instance_id not in (None, instance):
            if self.standing is not Standing.DOOMED:
                return [f"{self.room_id} is instance {instance} and was {self.instance_id}"]
            # It was destroyed, and this is a new one of the same name: nothing of the old one may be in it.
            self.files = {name: {None} for name in self.files}
            self.told, self.cut = {}, {}
        self.instance_id, self.standing = instance, Standing.THERE
        wrong += self._audit_files(room)
        wrong += self._audit_executions(room)
        return wrong

    def _audit_files(self, room: Room) -> list[str]:
        answer = patiently(lambda: room.post(SUMS))
        said = answer.json()
        if answer.status_code != 200 or said["result"]["exit_code"] != 0 or said["result"]["output_truncated"]:
            return [f"{self.room_id}: the files cannot be summed: {said}"]
        found = dict(reversed(line.split("  ", 1)) for line in said["result"]["output"].splitlines())
        wrong = [
            f"{self.room_id}: file {name} has {found.get(name)}, allowed are {allowed}"
            for name, allowed in self.files.items()
            if found.get(name) not in allowed and name not in self.unsure
        ]
        wrong += [f"{self.room_id}: file {name} was never written" for name in found.keys() - self.files.keys()]
        self.files = {name: {found.get(name)} for name in self.files}
        self.unsure.clear()
        return wrong

    def _audit_executions(self, room: Room) -> list[str]:
        wrong = []
        for execution_id, (output, exit_code, changes) in self.told.items():
            page = kept_output(room, execution_id)
            if (page.get("output"), page.get("exit_code"), page.get("ended")) != (output, exit_code, True):
                wrong.append(
                    f"{self.room_id}: execution {execution_id} answered {output!r} {exit_code}, kept is {page}"
                )
            listed = room.client.get(f"{room.path}/command/{execution_id}/files_changed").json()
            if listed.get("files_changed_total") != changes:
                wrong.append(f"{self.room_id}: execution {execution_id} changed {changes} files, kept is {listed}")
        for execution_id, output in self.cut.items():
            page = ended_output(room, execution_id)
            if page.get("error") == "execution_not_found":
                continue
            if not page.get("ended"):
                wrong.append(f"{self.room_id}: execution {execution_id} never ends: {page}")
            elif not output.startswith(page["output"]) or (page["exit_code"] == 0 and page["output"] != output):
                wrong.append(f"{self.room_id}: execution {execution_id} should say {output!r}, kept is {page}")
        # Settled; those that came to an end are as good as told.
        self.cut = {}
        return wrong


def patiently(request: Callable[[], httpx2.Response]) -> httpx2.Response:
    """The answer to a request, made again for as long as the server says "not now"."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (answer := request()).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.2)
    return answer


def kept_output(room: Room, execution_id: str) -> dict[str, Any]:
    """The kept output of an execution, or the error object."""
    page: dict[str, Any] = room.client.get(
        f"{room.path}/command/{execution_id}/output", params={"limit": 1_048_576}
    ).json()
    return page


def ended_output(room: Room, execution_id: str) -> dict[str, Any]:
    """The kept output once the execution has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "ended" in (page := kept_output(room, execution_id)) and not page["ended"] and time.monotonic() < deadline:
        time.sleep(0.1)
    return page
