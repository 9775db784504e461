"""The log of a room with a real guest, followed by the command line: every line once, through deaths of guest and server, until the room is deleted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_fixture import INN, Server, plain_environment, server, until

# The first microVM of a shape waits for its template, which on a busy machine takes longer than a request does.
FIRST_GUEST_SECONDS = 250
PATIENCE_SECONDS = 120


@pytest.fixture
def running(driver: str) -> Iterator[Server]:
    with server("base", driver=driver) as made:
        yield made


def test_a_follower_outlives_guest_and_server_and_gets_every_line_once(running: Server, tmp_path: Path) -> None:
    told = tmp_path / "followed.txt"

    def messages() -> list[str]:
        return [line.split(maxsplit=3)[3] for line in told.read_text().split("\n")[:-1]]

    def follow() -> subprocess.Popen[bytes]:
        with told.open("ab") as file:
            return subprocess.Popen(
                [INN, "logs", "--follow", "base/followed"],
                env={**plain_environment(), "INNKEEPER_HOME": str(running.home)},
                stdin=subprocess.DEVNULL,
                stdout=file,
            )

    api = running.api()
    room = api.room(api.profile("base"), "followed")
    until(lambda: room.client.post(room.path).status_code == 200, seconds=FIRST_GUEST_SECONDS)
    machine = running.machine_of(room.create()["instance_id"])
    follower = follow()
    try:
        until(lambda: messages() == ["Created"], seconds=PATIENCE_SECONDS)
        running.kill()
        running.start()
        api = running.api()
        # A guest in which something runs is not frozen; one that is does not end before it thaws.
        api.room(api.profile("base"), "followed").output("nohup sleep 10000 > /dev/null 2>&1 &")
        running.kill_sandbox(machine)
        until(lambda: len(messages()) == 2, seconds=PATIENCE_SECONDS)
        running.kill()
        running.start()
        api = running.api()
        room = api.room(api.profile("base"), "followed")
        until(lambda: room.client.post(room.path).status_code == 200, seconds=FIRST_GUEST_SECONDS)
        until(lambda: len(messages()) == 3, seconds=PATIENCE_SECONDS)
        created, failed, started = messages()
        assert (created, failed.partition(":")[0], started) == ("Created", "Failed", "Started on its disk")
        shown = running.inn("logs", "base/followed", "-n", "2")
        assert shown.stdout.splitlines() == told.read_text().splitlines()[1:]
        room.delete()
        assert follower.wait(PATIENCE_SECONDS) == 0
        assert len(messages()) == 3
        assert not list((running.home / "host" / "instance-logs").iterdir())
    finally:
        follower.kill()
        follower.wait()
