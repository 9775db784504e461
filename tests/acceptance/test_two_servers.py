"""Two servers on one machine, and what is left when one of them ends in whatever way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from server_fixture import Api, Room, Server, server, until


@pytest.fixture(scope="module")
def neighbour(driver: str) -> Iterator[Server]:
    """A second server with other settings: hardly any patience, memory for three guests, guests that outlive it."""
    settings = {
        "INNKEEPER_ROOM_WAIT_SECONDS": "0.02",
        "INNKEEPER_MEMORY_OVERCOMMIT": "0.2",
        "INNKEEPER_KEEP_MACHINES": "true",
    }
    with server("base", driver=driver, **settings) as running:
        yield running
        if running.process is not None:
            running.stop()
        # Its guests have outlived it until here.
        running.start(INNKEEPER_KEEP_MACHINES="false")


def ready(room: Room) -> str:
    """The instance of a room, asked for as the documentation says: again after a while."""
    deadline = time.monotonic() + 60
    while (answer := room.client.post(room.path)).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["instance_id"])


@pytest.fixture
def kept(neighbour: Server) -> Iterator[Room]:
    """A room of the neighbour with a file and a process in it, found anew whatever happened to its server."""
    api = neighbour.api()
    room = api.room(api.make_profile())
    ready(room)
    room.output("echo kept > kept.txt; (nohup sleep 1000 > /dev/null 2>&1 &)")
    yield room
    Room(neighbour.client(), room.profile_id, room.room_id).delete()


def again(neighbour: Server, room: Room) -> Room:
    return Room(neighbour.client(), room.profile_id, room.room_id)


def test_after_the_wait_limit_the_status_is_named(neighbour: Server) -> None:
    api = neighbour.api()
    room = api.room(api.make_profile())
    answer = room.client.post(room.path)
    assert (answer.status_code, answer.json()["error"]) == (503, "instance_not_ready"), answer.text
    said, _, status = answer.json()["message"].rpartition(" ")
    assert said == "Instance is still provisioning, current status:"
    assert status in ("active", "network_allocated", "ftap_created", "image_generated", "vm_started", "vm_booted")
    assert int(answer.headers["Retry-After"]) >= 1
    # It goes on coming up meanwhile, and it is the same one.
    instance = ready(room)
    assert room.create()["instance_id"] == instance
    assert room.delete().status_code == 204


def test_a_full_host_says_so(neighbour: Server) -> None:
    api = neighbour.api()
    room = api.room(api.make_profile(memory_mb=100_000))
    deadline = time.monotonic() + 20
    while (answer := room.client.post(room.path)).json()["error"] == "instance_not_ready":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
    assert answer.json() == {
        "error": "service_unavailable",
        "message": "No available hosts for instance provisioning",
    }
    assert room.delete().status_code == 404
    host = neighbour.inn("host", "list", "--json").stdout
    assert '"leaked": 0' in host


def test_they_do_not_disturb_each_other(innkeeper: Server, shared: Room, neighbour: Server, kept: Room) -> None:
    assert innkeeper.server_id != neighbour.server_id
    with ThreadPoolExecutor(8) as many:
        said = list(many.map(lambda n: (shared if n % 2 else kept).output(f"echo {n}"), range(40)))
    assert said == [str(n) for n in range(40)]
    instance = shared.create()["instance_id"]
    assert neighbour.client().get(f"/v1/rooms/{instance}").status_code == 404
    assert neighbour.client(innkeeper.token).get("/api/profiles").status_code == 401


def test_a_second_server_on_the_same_directory_is_refused(neighbour: Server) -> None:
    refused = neighbour.inn("serve", "--home", str(neighbour.home), "--port", "1")
    assert refused.returncode == 1 and "another server runs on" in refused.stderr
    assert neighbour.client().get("/healthz").status_code == 200


def test_stopping_one_leaves_the_others_guests_working(shared: Room, neighbour: Server, kept: Room) -> None:
    instance = ready(kept)
    pids = neighbour.sandbox_pids(neighbour.machine_of(instance))
    assert pids and neighbour.stop() == 0
    assert shared.output("echo still here") == "still here"
    assert neighbour.sandbox_pids(neighbour.machine_of(instance)) == pids
    neighbour.start()
    room = again(neighbour, kept)
    assert ready(room) == instance
    assert room.output("cat kept.txt; pgrep -c -x sleep") == "kept\n1"


def test_the_api_process_alone_is_killed(neighbour: Server, kept: Room) -> None:
    instance = ready(kept)
    execution = kept.run("echo before")["result"]["execution_id"]
    before = neighbour.api_pid()
    os.kill(before, signal.SIGKILL)
    room = again(neighbour, kept)

    def back() -> bool:
        with contextlib.suppress(httpx2.TransportError):
            return room.client.get("/healthz", timeout=2).status_code == 200
        return False

    until(back, seconds=30)
    assert neighbour.api_pid() != before
    assert ready(room) == instance
    assert room.output("cat kept.txt; pgrep -c -x sleep") == "kept\n1"
    assert room.client.get(f"{room.path}/command/{execution}/output").json()["output"] == "before\n"


def test_a_command_outlives_the_whole_server(neighbour: Server, kept: Room) -> None:
    instance = ready(kept)
    execution = kept.run("echo before; echo 1 > changed.txt")["result"]["execution_id"]
    kept.output("(nohup sh -c 'sleep 3; echo late > late.txt' > /dev/null 2>&1 &)")
    neighbour.kill()
    neighbour.start()
    room = again(neighbour, kept)
    assert ready(room) == instance
    assert room.output("cat kept.txt; pgrep -c -x sleep") in ("kept\n1", "kept\n2")
    piece = room.client.get(f"{room.path}/command/{execution}/output").json()
    assert (piece["output"], piece["ended"], piece["exit_code"]) == ("before\n", True, 0)
    page = room.client.get(f"{room.path}/command/{execution}/files_changed").json()
    assert [row["path"] for row in page["files_changed"]] == ["/home/user/changed.txt"]
    public = neighbour.client(token=None).get(page["files_changed"][0]["public_url"])
    assert (public.status_code, public.text) == (200, "1\n")
    until(lambda: room.file("/home/user/late.txt").status_code == 200, seconds=20)
    assert '"leaked": 0' in neighbour.inn("host", "list", "--json").stdout


def test_killed_again_and_again_it_forgets_nothing(neighbour: Server, kept: Room) -> None:
    instance = ready(kept)
    for number in range(2):
        room = again(neighbour, kept)
        ready(room)
        assert room.put(f"/home/user/{number}.txt", str(number).encode()).status_code == 201
        api = neighbour.api()
        other = api.room(kept.profile_id, f"made-{number}")
        made = ready(other)
        neighbour.kill()
        neighbour.start()
        assert ready(again(neighbour, other)) == made
        assert again(neighbour, other).delete().status_code == 204
    room = again(neighbour, kept)
    assert ready(room) == instance
    assert room.output("cat kept.txt 0.txt 1.txt") == "kept\n01"


def test_a_guest_does_not_reach_the_machines_real_addresses(neighbour: Server, kept: Room, api: Api) -> None:
    """This server's host is the machine itself, with the API and a listener of the test's on every address."""
    ready(kept)
    listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    addresses = ["127.0.0.1", *(address for address in listed if ":" not in address)]
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        for address in addresses:
            socket.create_connection((address, port), timeout=2).close()
            for one in (port, neighbour.port):
                probe = f"python3 -c 'import socket; socket.create_connection((\"{address}\", {one}), timeout=3)'"
                assert kept.run(probe)["result"]["exit_code"] == 1, (address, one)
