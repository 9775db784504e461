"""What clients do while servers are killed: rooms made and destroyed, commands run, files written, each entered into the books."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

import httpx2
from server_fixture import Server
from tests.faults.ledger import RoomBook, Standing

# An answer that takes longer is taken for a hang.
HANG_SECONDS = 60.0
ROOMS_EACH = 3
# In the dialect, "not now", in whatever form; and what says that somebody else was quicker.
NOT_NOW = {"service_unavailable", "instance_not_ready", "instance_failed"}


class Actor(Protocol):
    """Whoever does things until told to stop: what it is at, and what was not as it should be."""

    name: str
    doing: str
    wrong: list[str]

    def work(self, server: Server, stop: threading.Event) -> None:
        """Do one thing after the other until told to stop, or the server is gone."""


@dataclass
class Client:
    """One client: it does one thing at a time, with rooms that are its own."""

    name: str
    profiles: list[str]
    random: random.Random
    books: list[RoomBook] = field(default_factory=list)
    doing: str = ""
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    # Whether a connection may break: the API process is, or may be, a victim.
    may_break: bool = True

    def work(self, server: Server, stop: threading.Event) -> None:
        """Do one thing after the other until told to stop, or the server is gone."""
        client = server.client(timeout_seconds=HANG_SECONDS)
        while not stop.is_set():
            live = [book for book in self.books if book.standing is Standing.THERE]
            if not live or (len(live) < ROOMS_EACH and self.random.random() < 0.25):
                action, book = "create", RoomBook(self.random.choice(self.profiles), f"{self.name}-{uuid4().hex[:8]}")
                self.books.append(book)
            else:
                book = self.random.choice(live)
                action = self.random.choices(["exec", "stream", "write", "destroy"], [4, 3, 3, 1.2])[0]
            self.doing = action
            try:
                getattr(self, f"_{action}")(client, book)
            except httpx2.TimeoutException as error:
                self.wrong.append(f"{action} in {book.room_id} hangs: {type(error).__name__}")
                return
            except httpx2.TransportError as error:
                if not self.may_break:
                    self.wrong.append(f"{action} in {book.room_id}: {type(error).__name__}: {error}")
                return
            except Exception as error:
                self.wrong.append(f"{action} in {book.room_id}: {type(error).__name__}: {error}")
                raise
            self.done[action] += 1
            self.doing = ""

    def _create(self, client: httpx2.Client, book: RoomBook) -> None:
        answer = client.post(book.room(client).path)
        if self._accepted(answer, 200):
            book.instance_id, book.standing = answer.json()["instance_id"], Standing.THERE

    def _exec(self, client: httpx2.Client, book: RoomBook) -> None:
        line, output, name, digest = self._command()
        book.writing(name, digest)
        answer = client.post(f"{book.room(client).path}/command", json={"command": line})
        if self._accepted(answer, 200):
            self._enter(book, answer.json(), output, name, digest)

    def _stream(self, client: httpx2.Client, book: RoomBook) -> None:
        line, output, name, digest = self._command()
        book.writing(name, digest)
        headers, path = {"Accept": "text/event-stream"}, f"{book.room(client).path}/command"
        with client.stream("POST", path, json={"command": line}, headers=headers) as answer:
            if answer.status_code != 200:
                answer.read()
                self._accepted(answer, 200)
                return
            for kind, said in events(answer):
                if kind == "started":
                    book.cut[said["execution_id"]] = f"{output}\n"
                elif kind == "result":
                    book.cut.pop(said["result"]["execution_id"])
                    self._enter(book, said, output, name, digest)
                elif kind == "error":
                    self._not_now(said, 503)

    def _enter(self, book: RoomBook, said: dict[str, Any], output: str, name: str, digest: str) -> None:
        result = said["result"]
        if result["exit_code"] != 0 or result["output"] != output:
            self.wrong.append(f"a command of {book.room_id} answered {result}, not {output!r}")
            return
        if f"/home/user/{name}" not in {row["path"] for row in result["files_changed"]}:
            self.wrong.append(f"a command of {book.room_id} wrote {name} and reported {result['files_changed']}")
        book.files[name] = {digest}
        # The journal keeps the newline at the end that the answer leaves out.
        book.told[result["execution_id"]] = (f"{output}\n", 0, result["files_changed_total"])

    def _write(self, client: httpx2.Client, book: RoomBook) -> None:
        content = self.random.randbytes(self.random.choice([100, 100_000, 3_000_000]))
        digest, name = hashlib.sha256(content).hexdigest(), f"f-{self.random.randrange(3)}"
        book.writing(name, digest)
        answer = client.put(f"{book.room(client).path}/file/home/user/{name}", content=content)
        if self._accepted(answer, 200, 201):
            book.files[name] = {digest}

    def _destroy(self, client: httpx2.Client, book: RoomBook) -> None:
        book.standing = Standing.DOOMED
        answer = book.room(client).delete()
        if self._accepted(answer, 204):
            book.standing = Standing.GONE

    def _command(self) -> tuple[str, str, str, str]:
        """A line that leaves one file whole or not at all, what it says, and the file's name and digest."""
        token, lines = uuid4().hex, self.random.choice([3, 40])
        name, output = f"m-{token[:12]}", "\n".join([*(str(n) for n in range(1, lines + 1)), token])
        pause = self.random.choice(["", "sleep 0.1; ", "sleep 0.7; "])
        line = f"printf %s {token} > .{name} && mv .{name} {name}; seq {lines}; {pause}echo {token}"
        return line, output, name, hashlib.sha256(token.encode()).hexdigest()

    def _accepted(self, answer: httpx2.Response, *statuses: int) -> bool:
        if answer.status_code in statuses:
            return True
        try:
            self._not_now(answer.json(), answer.status_code)
        except ValueError:
            self.wrong.append(f"{self.doing} answered {answer.status_code} {answer.text[:500]!r}")
        return False

    def _not_now(self, said: dict[str, Any], status: int) -> None:
        """A refusal has to be one that tells a client to come again, in the one shape of errors, without internals."""
        message = str(said.get("message"))
        if set(said) != {"error", "message"} or said["error"] not in NOT_NOW or status != 503:
            self.wrong.append(f"{self.doing} answered {status} {said}")
        elif any(internal in message for internal in ("Traceback", "Error(", "/host/", "runsc", "qemu")):
            self.wrong.append(f"{self.doing} shows internals: {said}")
        self.done[f"{self.doing} refused"] += 1
        # What is told to come again comes again, but not at once.
        time.sleep(0.05)


@contextlib.contextmanager
def working(clients: Sequence[Actor], server: Server) -> Iterator[None]:
    """All clients at work, each in a thread; at the end each has the answer that it waited for."""
    stop = threading.Event()
    threads = [threading.Thread(target=client.work, args=(server, stop), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for client, thread in zip(clients, threads, strict=True):
            thread.join(2 * HANG_SECONDS)
            if thread.is_alive():
                client.wrong.append(f"{client.doing} of {client.name} never ends")


def events(answer: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a stream, each with its object."""
    kind = ""
    for line in answer.iter_lines():
        if line.startswith("event:"):
            kind = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            yield kind, json.loads(line.removeprefix("data:"))
