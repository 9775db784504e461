"""Terminals over HTTP and WebSockets, against a real server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_fixture import Api, Room, Server, server, until
from terminal_client import address, terminal
from tests.integration.daemon_fixture import NEEDS_RUNSC
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

pytestmark = NEEDS_RUNSC


@pytest.fixture(scope="module")
def innkeeper(driver: str) -> Iterator[Server]:
    with server("base", driver=driver, INNKEEPER_MAX_TERMINALS="3", INNKEEPER_LOG_LEVEL="debug") as running:
        yield running


@pytest.fixture(scope="module")
def api(innkeeper: Server) -> Api:
    return innkeeper.api()


@pytest.fixture(scope="module")
def room(api: Api) -> Room:
    made = api.room(api.make_profile())
    made.create()
    return made


@pytest.fixture(scope="module")
def base(room: Room) -> str:
    return f"/v1/rooms/{room.create()['instance_id']}"


@pytest.fixture(autouse=True)
def none_left(innkeeper: Server, base: str) -> Iterator[None]:
    yield
    client = innkeeper.client()
    for row in client.get(f"{base}/pty/sessions").json():
        assert client.delete(f"{base}/pty/sessions/{row['id']}").status_code == 200


def start(api: Api, base: str, **body: Any) -> str:
    answer = api.client.post(f"{base}/pty/sessions", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["session_id"])


# Without readline, so that the terminal itself echoes.
PLAIN = "exec bash --norc --noediting -i"


@pytest.mark.microvms
def test_a_terminal_from_its_start_to_its_end(innkeeper: Server, api: Api, base: str, room: Room) -> None:
    name = start(api, base, cols=100, rows=30)
    with terminal(innkeeper, base, name) as shell:
        shell.type("tty; stty size; shopt login_shell; [[ $- == *i* ]] && echo interactive; pwd\n")
        at = shell.until("/dev/pts/")
        for said in ("30 100", "login_shell", "on", "interactive", "/home/user"):
            at = shell.until(said, after=at)
        shell.tell(type="resize", cols=120, rows=40)
        shell.tell(type="of a newer client")
        until(lambda: api.client.get(f"{base}/pty/sessions/{name}").json()["cols"] == 120)
        assert api.client.post(f"{base}/pty/sessions/{name}/resize", json={"cols": 90, "rows": 20}).json()["rows"] == 20
        row = api.client.get(f"{base}/pty/sessions").json()[0]
        assert (row["id"], row["alive"], row["exit_code"], row["viewers"]) == (name, True, None, 1)
        shell.type("exit 5\n")
        assert shell.end() == (1000, "")
        assert shell.said == [{"type": "exit", "exit_code": 5}]
    assert api.client.get(f"{base}/pty/sessions").json() == []
    ended = api.client.get(f"{base}/pty/sessions/{name}").json()
    assert (ended["alive"], ended["exit_code"]) == (False, 5)
    # Whoever comes too late sees it all the same.
    with terminal(innkeeper, base, name) as late:
        assert late.end() == (1000, "") and late.said == [{"type": "exit", "exit_code": 5}]
        assert b"interactive" in late.seen
    assert api.client.delete(f"{base}/pty/sessions/{name}").status_code == 200
    assert api.client.get(f"{base}/pty/sessions/{name}").status_code == 404


def test_what_is_started(innkeeper: Server, api: Api, base: str) -> None:
    for body, said in (
        ({"command": "echo $((1+1)) $0 | cat; exit 3"}, "2 "),
        ({"shell": "/bin/sh"}, "$ "),
        ({"shell": "python3"}, ">>> "),
    ):
        name = start(api, base, **body)
        with terminal(innkeeper, base, name) as shown:
            shown.until(said)
        assert api.client.delete(f"{base}/pty/sessions/{name}").status_code == 200
    for wrong in (
        {"shell": "/bin/nosuch"},
        {"shell": ""},
        {"shell": "sh", "command": "x"},
        {"command": "a\0b"},
        {"id": "a/b"},
        {"id": ""},
        {"cols": 0},
        {"rows": "9"},
        {"colour": "red"},
    ):
        answer = api.client.post(f"{base}/pty/sessions", json=wrong)
        assert answer.status_code in (400, 422), (wrong, answer.text)
        assert answer.json()["detail"]
    assert api.client.get(f"{base}/pty/sessions").json() == []


def test_names_and_the_limit(api: Api, base: str) -> None:
    assert start(api, base, id="mine") == "mine"
    assert api.client.post(f"{base}/pty/sessions", json={"id": "mine"}).status_code == 409
    start(api, base), start(api, base)
    refused = api.client.post(f"{base}/pty/sessions", json={})
    assert refused.status_code == 429 and "3 terminals" in refused.json()["detail"]


@pytest.mark.microvms
def test_leaving_and_coming_back(innkeeper: Server, api: Api, base: str) -> None:
    name = start(api, base, command=PLAIN)
    with terminal(innkeeper, base, name) as first:
        first.type("x=kept; PS1=; sleep 1; echo while-$((1+1))\n")
        first.until("sleep 1")
        # Cut, not closed.
        first.socket.socket.shutdown(socket.SHUT_RDWR)
    with terminal(innkeeper, base, name) as again, terminal(innkeeper, base, name) as other:
        again.until("while-2\r\n")
        again.type("echo $x\n")
        at = again.until("\r\nkept\r\n")
        other.until("\r\nkept\r\n")
        other.type("echo from-$((40+2))\n")
        again.until("from-42\r\n")
    with terminal(innkeeper, base, name, offset=str(at)) as later:
        later.until("from-42\r\n")
        assert later.said == [{"type": "offset", "offset": at}] and b"kept" not in later.seen


def test_keys_and_strangers(innkeeper: Server, api: Api, base: str) -> None:
    name = start(api, base)
    # Every way to show a key; what a page of another origin sends is none.
    for headers in ({"Authorization": f"Bearer {innkeeper.token}"}, {"X-API-Key": innkeeper.token}):
        with terminal(innkeeper, base, name, headers=headers, api_key="") as known:
            known.type("echo known\n")
            known.until("known")
    for query, headers in (
        ({"api_key": ""}, {"Origin": "https://elsewhere.example"}),
        ({"api_key": "wrong"}, {}),
        ({"api_key": "x" * 600}, {}),
    ):
        with terminal(innkeeper, base, name, headers=headers, **query) as unknown:
            assert unknown.end()[0] == 4401
            assert not unknown.seen and not unknown.said
    # What is not there is told as HTTP: those who connect read the status.
    for wrong in (f"{base}/pty/nosuch", "/v1/rooms/00000000-0000-4000-8000-000000000000/pty/x"):
        where, _, what = wrong.rpartition("/pty/")
        with pytest.raises(InvalidStatus) as refused:
            connect(address(innkeeper, where, what), proxy=None)
        assert refused.value.response.status_code == 404
        assert json.loads(refused.value.response.body)["detail"]
    plain = api.client.get(f"{base}/pty/{name}/connect")
    assert (plain.status_code, plain.json()["code"]) == (426, "upgrade_required")
    assert innkeeper.token not in innkeeper.log()
    # The start of the token tells people which one it is; the query as a whole is nowhere.
    assert "api_key=" not in innkeeper.log()


def processes_that_tell(secret: str) -> list[str]:
    """The command lines of all processes of the host that have a text in their arguments or their environment, this one's children apart from this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            if int(process.name) != os.getpid() and any(secret.encode() in text for text in told):
                found.append(told[0].replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_the_key_is_in_no_list_of_processes(innkeeper: Server, api: Api, base: str, room: Room) -> None:
    name = start(api, base)
    with terminal(innkeeper, base, name) as one:
        one.type("echo kno''wn\n")
        one.until("known")
        told = processes_that_tell(innkeeper.token)
        inside = room.output(r"cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>&1 | tr '\0' '\n'")
        # What would be found.
        control = subprocess.Popen(["sleep", "60"], env={"KEY": innkeeper.token})
        try:
            until(lambda: processes_that_tell(innkeeper.token) == [*told, "sleep 60 "])
        finally:
            control.kill()
            control.wait()
    assert told == []
    assert "PATH=" in inside and innkeeper.token not in inside


def test_messages_that_make_no_sense(innkeeper: Server, api: Api, base: str) -> None:
    name = start(api, base)
    for text in ("no JSON", "[1]", '{"type": "resize", "cols": 0, "rows": 1}', '{"type": "resize"}', "[" * 5_000):
        with terminal(innkeeper, base, name) as shell:
            shell.socket.send(text)
            code, reason = shell.end()
            assert code == 4400 and reason, text
    with terminal(innkeeper, base, name) as shell:
        shell.type("x" * 300_000)
        assert shell.end()[0] == 1009
    with terminal(innkeeper, base, name) as shell:
        # A Ctrl-C while it reads its profile would end it.
        prompt = shell.until("$ ")
        shell.type("\x03")
        # What comes at once with it is thrown away.
        shell.until("$ ", after=prompt)
        shell.type("echo still-$((1+1))\n")
        shell.until("still-2")


def test_echo(innkeeper: Server, api: Api, base: str) -> None:
    name = start(api, base, command="cat")
    took = []
    with terminal(innkeeper, base, name) as shell:
        for number in range(100):
            began = time.perf_counter()
            shell.type("abcdefghij"[number % 10])
            while len(shell.seen) <= number:
                assert shell.receive(10)
            took.append((time.perf_counter() - began) * 1000)
    print(f"echo over WebSocket: median {sorted(took)[50]:.2f} ms")


COUNT = "stty -echo; n=0; while [ ! -e stop ]; do echo $n; n=$((n+1)); sleep 0.02; done; echo end-$n"


def test_viewers_of_a_killed_server_go_on_where_they_were(innkeeper: Server, api: Api, base: str, room: Room) -> None:
    # Last of all that uses the module's clients: a killed server takes their connections with it.
    name = start(api, base, id="lasting", command=COUNT)
    seen = [b"", b""]
    for kill in (lambda: os.kill(innkeeper.api_pid(), 9), innkeeper.kill):
        with contextlib.ExitStack() as stack:
            viewers = [stack.enter_context(terminal(innkeeper, base, name, offset=str(len(one)))) for one in seen]
            for number, viewer in enumerate(viewers):
                # The one who comes second sees what came before too; both see more while they look.
                viewer.until("\n", after=viewer.until("0\r\n"))
                assert viewer.said == [{"type": "offset", "offset": len(seen[number])}]
            kill()
            for number, viewer in enumerate(viewers):
                # The API process goes with its host, and may have the time to say so.
                assert viewer.end() in ((1006, ""), (4502, "The connection to the host was lost"))
                seen[number] += viewer.seen
        if innkeeper.process is None:
            innkeeper.start()
        until(lambda: _answers(innkeeper, base))
    client = innkeeper.client()
    # It runs on, whoever looks or does not.
    row = client.get(f"{base}/pty/sessions/{name}").json()
    assert (row["alive"], row["viewers"]) == (True, 0) and row["offset"] > max(map(len, seen))
    assert Room(client, room.profile_id, room.room_id).output("touch stop") == ""
    for number, before in enumerate(seen):
        with terminal(innkeeper, base, name, offset=str(len(before))) as viewer:
            assert viewer.end() == (1000, "")
            seen[number] += viewer.seen
    lines = seen[0].decode().splitlines()
    assert seen[0] == seen[1] and lines == [*map(str, range(len(lines) - 1)), f"end-{len(lines) - 1}"]
    assert client.delete(f"{base}/pty/sessions/{name}").status_code == 200


def _answers(innkeeper: Server, base: str) -> bool:
    try:
        return innkeeper.client().get(f"{base}/pty/sessions").status_code == 200
    except Exception:
        return False
