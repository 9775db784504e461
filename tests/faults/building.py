"""A client that has images built and imported while servers are killed, and its books of them."""

from __future__ import annotations

import functools
import io
import random
import re
import tarfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
from server_fixture import Room, Server, fresh
from tests.faults.ledger import PATIENCE_SECONDS, patiently
from tests.faults.workload import HANG_SECONDS, events
from tests.integration import oci_fixture as oci
from tests.integration.daemon_fixture import build_go

# What stands at the beginning of all: a shell of a few words, in an archive. The first step is kept from build to build, the others run each time.
BASE = "shell:1"
DOCKERFILE = """\
FROM {base}
RUN echo kept > /kept
COPY content /content
RUN sleep {pause} ; cat /content > /made
"""
IMAGES = 3
# Why something that was being made is not: the server ended, or a guest of its was killed. Nothing of the server's inside may be in it.
REASONS = re.compile(
    r"The server ended|The connection to the host was lost|Dockerfile line \d+: .*(ended|lost|instance|guest|exit code 137)"
    r"|The (host|instance|guest|server|machine)|No available hosts|could not be started",
    re.IGNORECASE,
)
INTERNALS = ("Traceback", "Error(", "/host/", "runsc", "None")


@functools.cache
def shell() -> bytes:
    """The static program that stands for a shell."""
    return build_go(Path(__file__).parents[1] / "tiny_shell", "tiny-shell").read_bytes()


def archive(content: str) -> bytes:
    """An archive of an image with a shell, and a file that says what it is."""
    files = [("bin", oci.folder()), ("bin/sh", oci.file(shell(), mode=0o755)), ("made", oci.file(content.encode()))]
    return oci.oci_archive([oci.layer(files)])


@dataclass
class ImageBook:
    """One image: what may be in it (None: there is no such image), and the builds of it whose end nobody has heard of."""

    name: str
    contents: set[str | None] = field(default_factory=lambda: {None})
    open_builds: dict[str, str] = field(default_factory=dict)
    changed: bool = False


@dataclass
class Builder:
    """One client that makes one image after the other."""

    name: str
    random: random.Random
    images: list[ImageBook] = field(default_factory=list)
    doing: str = ""
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    may_break: bool = True

    def __post_init__(self) -> None:
        self.images = [ImageBook(f"{self.name}:{number}") for number in range(IMAGES)]

    def prepare(self, server: Server) -> None:
        """Have what the others are built on."""
        client = server.client()
        answer = client.put(f"/v1/images/{BASE}/archive", content=archive("base"))
        assert answer.status_code == 202, answer.text
        assert self._settled(client, BASE)["status"] == "ready"

    def work(self, server: Server, stop: threading.Event) -> None:
        """Make one image after the other until told to stop, or the server is gone."""
        client = server.client(timeout_seconds=HANG_SECONDS)
        while not stop.is_set():
            book = self.random.choice(self.images)
            self.doing = self.random.choice(["build", "build", "import"])
            try:
                getattr(self, f"_{self.doing}")(client, book)
            except httpx2.TimeoutException as error:
                self.wrong.append(f"{self.doing} of {book.name} hangs: {type(error).__name__}")
                return
            except httpx2.TransportError as error:
                if not self.may_break:
                    self.wrong.append(f"{self.doing} of {book.name}: {type(error).__name__}: {error}")
                return
            except Exception as error:
                self.wrong.append(f"{self.doing} of {book.name}: {type(error).__name__}: {error}")
                raise
            self.doing = ""

    def _build(self, client: httpx2.Client, book: ImageBook) -> None:
        content = uuid4().hex
        text = DOCKERFILE.format(base=BASE, pause=self.random.choice(["0", "0.3", "1"]))
        answer = client.post("/v1/image-builds", json={"name": book.name, "dockerfile": text})
        if not self._begun(answer, 201):
            return
        book.changed = True
        book.contents.add(content)
        build_id = answer.json()["id"]
        book.open_builds[build_id] = content
        sent = client.put(f"/v1/image-builds/{build_id}/context", content=context(content))
        if sent.status_code != 204:
            self._not_begun(sent)
        with client.stream("GET", f"/v1/image-builds/{build_id}/events") as stream:
            for kind, said in events(stream):
                if kind == "end":
                    self._told(book, build_id, said)

    def _told(self, book: ImageBook, build_id: str, said: dict[str, Any]) -> None:
        """Take note of a build's end, which is as it is from now on."""
        content = book.open_builds.pop(build_id)
        if said["status"] == "ready":
            book.contents = {content}
            self.done["build"] += 1
        else:
            book.contents.discard(content)
            self.done[f"build {said['status']}"] += 1
            self._check_reason(f"build of {book.name}", said["error"])

    def _import(self, client: httpx2.Client, book: ImageBook) -> None:
        content = uuid4().hex
        book.changed = True
        book.contents.add(content)
        answer = client.put(f"/v1/images/{book.name}/archive", content=archive(content))
        if not self._begun(answer, 202):
            return
        image = self._settled(client, book.name)
        if image["status"] == "ready" and image["last_error"] is None:
            book.contents = {content}
            self.done["import"] += 1
        else:
            book.contents.discard(content)
            self.done["import failed"] += 1
            self._check_reason(f"import of {book.name}", image["last_error"])

    def _settled(self, client: httpx2.Client, name: str) -> dict[str, Any]:
        """The image once nobody makes it any more."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (image := client.get(f"/v1/images/{name}").json())["status"] == "building":
            assert time.monotonic() < deadline, f"{name} is being made for ever"
            time.sleep(0.05)
        return dict(image)

    def _begun(self, answer: httpx2.Response, status: int) -> bool:
        if answer.status_code != status:
            self._not_begun(answer)
        return answer.status_code == status

    def _not_begun(self, answer: httpx2.Response) -> None:
        """Nothing was begun, or what was begun goes no further; the reason has to be one that a client understands."""
        self.done[f"{self.doing} refused"] += 1
        said = answer.json()
        # 409: of a build that an earlier daemon began, and that is not over yet.
        if answer.status_code not in (409, 422, 503) or set(said) < {"error", "message"}:
            self.wrong.append(f"{self.doing} answered {answer.status_code} {said}")
        else:
            self._check_reason(self.doing, said["message"], any_reason=answer.status_code == 409)
        time.sleep(0.05)

    def _check_reason(self, what: str, reason: str | None, *, any_reason: bool = False) -> None:
        text = reason or ""
        if not text or any(internal in text for internal in INTERNALS) or not (any_reason or REASONS.search(text)):
            self.wrong.append(f"{what} says {reason!r}")

    # --- after a fault -----------------------------------------------------------------------------------------------

    def audit(self, running: Server) -> list[str]:
        """Compare with what the server has, and settle what was open. One line per discrepancy."""
        client = running.client()
        wrong = []
        for book in self.images:
            for build_id in list(book.open_builds):
                self._told_afterwards(client, book, build_id)
            if book.changed:
                wrong += self._audit_image(client, book)
        context_files = [str(path) for path in (running.home / "api" / "builds").glob("*/context.tar")]
        return [*wrong, *(f"left of a build: {path}" for path in context_files)]

    def _told_afterwards(self, client: httpx2.Client, book: ImageBook, build_id: str) -> None:
        """A build whose end nobody has heard of comes to one; whether its image was made before that, its content says."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (said := client.get(f"/v1/image-builds/{build_id}").json())["status"] in ("waiting", "running"):
            assert time.monotonic() < deadline, f"build {build_id} never ends: {said}"
            time.sleep(0.05)
        self._told(book, build_id, said)

    def _audit_image(self, client: httpx2.Client, book: ImageBook) -> list[str]:
        answer = client.get(f"/v1/images/{book.name}")
        content = None
        if answer.status_code == 200:
            image = self._settled(client, book.name)
            if image["digest"]:
                content = content_of(client, book.name)
            elif image["status"] != "failed" or not image["last_error"]:
                return [f"image {book.name} is {image}"]
        if content not in book.contents:
            return [f"image {book.name} has {content!r}, allowed are {book.contents}"]
        book.contents, book.changed = {content}, False
        return []


def content_of(client: httpx2.Client, image: str) -> str:
    """What a room on the image finds in it."""
    body = {"name": fresh("built"), "image": image, "warm_pool_size": 0, "memory_mb": 256}
    profile = client.post("/api/profiles", json=body).json()
    room = Room(client, str(profile["id"]), fresh("on-image"))
    try:
        answer = patiently(lambda: client.post(room.path))
        assert answer.status_code == 200, answer.text
        said = patiently(lambda: room.post("cat /made")).json()
        return str(said["result"]["output"]) if "result" in said else str(said)
    finally:
        patiently(room.delete)
        client.delete(f"/api/profile/{profile['id']}")


def context(content: str) -> bytes:
    """The files of a build."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as stream:
        member = tarfile.TarInfo("content")
        member.size = len(content)
        stream.addfile(member, io.BytesIO(content.encode()))
    return buffer.getvalue()
