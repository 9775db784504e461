"""`kill -9` of the server while code runs in a VM and files are on their way into it: nothing that was acknowledged is lost, nothing half done is left."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from server_fixture import Server, ended, server, until
from tests.faults import census
from tests.faults.victims import come_back, kill

MEBIBYTE = 1 << 20
OLD = b"as it was before"
UPLOADS = "/srv/uploads"
BOUNDARY = "0123456789abcdef"
# They count until somebody makes a file, and say at last how far they came.
COUNT_IN_PYTHON = """\
import os, sys, time
n = 0
while not os.path.exists({go!r}):
    print(n); print(n, file=sys.stderr); n += 1; time.sleep(0.02)
print('end', n)
n"""
COUNT_IN_SHELL = "n=0; while [ ! -e {go} ]; do echo $n; echo $n >&2; n=$((n+1)); sleep 0.02; done; echo end $n"


@pytest.fixture(scope="module")
def running(driver: str) -> Iterator[Server]:
    with server("base", driver=driver) as made:
        yield made


@pytest.fixture(scope="module")
def vm(running: Server) -> dict[str, str]:
    """A VM for all kills: it outlives them."""
    made: dict[str, str] = running.client().post("/v1/vms", json={"vm_lifetime_seconds": 3_600}).json()
    return made


class Interrupted:
    """A request that the server does not live to answer, in a thread of its own."""

    def __init__(self, running: Server, work: Callable[[httpx2.Client], object]) -> None:
        self._client = running.client()
        # Its own to close: from another thread it would fail otherwise than by the server's end.
        running.clients.remove(self._client)
        self._end: object = None
        self._thread = threading.Thread(target=self._run, args=(work,))
        self._thread.start()

    def _run(self, work: Callable[[httpx2.Client], object]) -> None:
        with self._client:
            try:
                self._end = work(self._client)
            except Exception as error:
                self._end = error

    def was_cut_off(self) -> bool:
        """Whether its connection broke, or an API process that lost its daemon could still say so."""
        self._thread.join(60)
        end = self._end
        return isinstance(end, (httpx2.TransportError, StreamEndedError)) or (
            isinstance(end, httpx2.Response) and end.status_code == 503
        )


class StreamEndedError(Exception):
    """The server says that it cannot go on."""


class Watcher:
    """Follows an execution's stream from where it stood when the last one broke."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen = "0"
        self.text = {"stdout": "", "stderr": ""}
        self.result: dict[str, Any] | None = None

    def follow(self, client: httpx2.Client) -> None:
        with client.stream("GET", self._path, headers={"Last-Event-ID": self._seen}) as answer:
            number, event = self._seen, ""
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    number = value
                elif name == "event":
                    event = value
                elif name == "data" and event == "output":
                    said = json.loads(value)
                    self.text[said["stream"]] += said["data"]
                    self._seen = number
                elif name == "data" and event == "result":
                    self.result = json.loads(value)
                elif name == "data":
                    raise StreamEndedError(event, value)


@pytest.mark.microvms
@pytest.mark.parametrize("victim", ["api", "daemon", "both"])
def test_what_runs_goes_on_and_what_was_being_written_is_as_it_was(
    running: Server, vm: dict[str, str], victim: str
) -> None:
    client = running.client()
    go, vm_path = f"/srv/go-{victim}", f"/v1/vms/{vm['vm_id']}"
    shell, python = COUNT_IN_SHELL.format(go=go), COUNT_IN_PYTHON.format(go=go)
    of = {"vm_id": vm["vm_id"], "timeout": 600}
    names = {name: f"{UPLOADS}/{victim}-{name}" for name in ("put", "form", "new")}
    for name in ("put", "form"):
        put(client, vm_path, names[name], OLD)
    assert client.post("/execute", json={**of, "code": "kept = 7"}).json()["exit_code"] == 0

    begun = {
        "cell": client.post("/execute_async", json={**of, "code": python}).json()["task_id"],
        "background": client.post(
            f"{vm_path}/exec", json={"argv": ["sh", "-c", shell], "timeout": 600, "background": True}
        ).json()["execution_id"],
    }
    watcher = Watcher(f"/v1/executions/{begun['background']}/stream")
    killed = threading.Event()
    cut_off = [
        Interrupted(running, watcher.follow),
        Interrupted(running, lambda own: own.post("/execute", json={**of, "code": shell, "language": "bash"})),
        Interrupted(running, lambda own: put(own, vm_path, names["put"], slowly(killed))),
        Interrupted(running, lambda own: put(own, vm_path, names["new"], slowly(killed))),
        Interrupted(running, lambda own: upload(own, vm["session_id"], names["form"], slowly(killed))),
    ]
    until(lambda: watcher.text["stdout"] and watcher.text["stderr"])
    until(lambda: running_bash(client, vm_path))
    (begun["waited_for"],) = running_bash(client, vm_path)
    until(lambda: all(output(client, one) for one in begun.values()))
    until(lambda: len(drafts(client, vm_path)) == 3)

    pids = kill(running, victim, random.Random())
    until(lambda: all(map(ended, pids)))
    killed.set()
    come_back(running, victim)
    assert all(one.was_cut_off() for one in cut_off)

    client = running.client()
    assert client.get(vm_path).json()["status"] == "active"
    before = {name: output(client, one) for name, one in begun.items()}
    until(lambda: all(len(output(client, one)) > len(before[name]) for name, one in begun.items()))
    assert client.post(f"{vm_path}/exec", json={"argv": ["touch", go]}).json()["exit_code"] == 0
    for name, one in begun.items():
        until(lambda one=one: client.get(f"/v1/executions/{one}").json()["is_complete"])  # type: ignore[misc]
        record = client.get(f"/v1/executions/{one}").json()
        assert (record["status"], record["exit_code"], record["error"]) == ("completed", 0, None), (name, record)
        count = counted(record["serialized_stdout"], record["serialized_stderr"], of_cell=name == "cell")
        results = [row["data"]["text/plain"] for row in record["results"]]
        assert results == ([str(count)] if name == "cell" else [])
    # Who lost the stream goes on where it was: nothing is missing, nothing comes twice.
    watcher.follow(client)
    counted(watcher.text["stdout"], watcher.text["stderr"])
    assert watcher.result is not None and watcher.result["exit_code"] == 0
    cell = client.post("/execute", json={**of, "code": "kept"}).json()
    assert (cell["stdout"], cell["kernel"]) == ("7\n", {"fresh": False, "lost": False})

    until(lambda: drafts(client, vm_path) == [])
    for name in ("put", "form"):
        assert client.get(f"{vm_path}/files/content", params={"path": names[name]}).content == OLD
    assert client.get(f"{vm_path}/files/content", params={"path": names["new"]}).status_code == 404
    assert put(client, vm_path, names["put"], b"another").status_code == 200
    assert census.wait_for_none(running.home) == []


def counted(stdout: str, stderr: str, *, of_cell: bool = False) -> int:
    """How far a program counted that says every number once, in order, on both outputs."""
    lines = stdout.splitlines()
    if of_cell:
        # The value of its last expression.
        assert lines.pop() == lines[-1].removeprefix("end ")
    count = int(lines.pop().removeprefix("end "))
    assert count > 0
    assert lines == stderr.splitlines() == [str(number) for number in range(count)]
    return count


def running_bash(client: httpx2.Client, vm_path: str) -> list[str]:
    """The id of what a waiting client has begun: nobody told it."""
    rows = client.get(f"{vm_path}/executions").json()
    ids = [row["execution_id"] for row in rows if row["language"] == "bash"]
    return [one for one in ids if not client.get(f"/v1/executions/{one}").json()["is_complete"]]


def output(client: httpx2.Client, execution: str) -> str:
    answer = client.get(f"/v1/executions/{execution}")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["serialized_stdout"])


def drafts(client: httpx2.Client, vm_path: str) -> list[str]:
    """Files in the uploads' directory that nobody asked for."""
    rows = client.get(f"{vm_path}/files", params={"path": UPLOADS}).json()["entries"]
    return [row["name"] for row in rows if not row["name"].endswith(("-put", "-form", "-new"))]


def slowly(killed: threading.Event) -> Iterator[bytes]:
    """50 MiB, of which the last 30 come when the server is gone."""
    for number in range(50):
        if number == 20:
            killed.wait(60)
        yield bytes([number]) * MEBIBYTE


def put(client: httpx2.Client, vm_path: str, path: str, content: bytes | Iterator[bytes]) -> httpx2.Response:
    return client.put(f"{vm_path}/files/content", params={"path": path}, content=content)


def upload(client: httpx2.Client, session_id: str, path: str, content: Iterator[bytes]) -> httpx2.Response:
    def body() -> Iterator[bytes]:
        for name, value in (("session_id", session_id), ("remote_path", path)):
            yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'.encode()
        yield from content
        yield f"\r\n--{BOUNDARY}--\r\n".encode()

    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return client.post("/upload", content=body(), headers=headers)
