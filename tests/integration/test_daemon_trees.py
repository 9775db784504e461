"""Trees of files over the bus, in real guests: found, searched, moved, packed and watched as the guest's user."""

import asyncio
import dataclasses
import io
import json
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host

from innkeeper.bus.contract import Data, Message
from innkeeper.core import tree_verbs as verbs
from innkeeper.core.host_verbs import to_wire
from innkeeper.errors import (
    ConflictError,
    FileMissingError,
    ForbiddenError,
    InnkeeperError,
    InvalidRequestError,
    RateLimitedError,
)

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

HOME = "/home/user"
PATIENCE_SECONDS = 30.0


@pytest.fixture(scope="module")
async def room(host: Host) -> UUID:
    return await host.ensure()


async def pages(host: Host, request: Any, rows: str) -> list[dict[str, Any]]:
    """The rows of all pages."""
    found: list[dict[str, Any]] = []
    while True:
        answer = await host.request(request)
        found += answer[rows]
        if answer["next_cursor"] is None:
            return found
        request = dataclasses.replace(request, cursor=answer["next_cursor"])


async def test_glob_and_search(host: Host, room: UUID) -> None:
    await host.ok(
        room, "mkdir -p g/src/deep g/closed; cd g; echo 'import os' | tee a.py src/b.py src/deep/c.py >src/x.txt"
    )
    await host.ok(
        room, "cd g; printf '\\0import' >src/bin; touch $'src/odd\\xff\\n.py'; ln -s / src/deep/up; chmod 0 closed"
    )
    for limit in (1, 1_000):
        found = await pages(host, verbs.GlobFiles(room, f"{HOME}/g", "**/*.py", limit=limit), "entries")
        assert [row["path"] for row in found] == ["a.py", "src/b.py", "src/deep/c.py", "b64:c3JjL29kZP8KLnB5"]
        request = verbs.SearchFiles(room, f"{HOME}/g", "^IMPORT", regex=True, ignore_case=True, limit=limit)
        matches = await pages(host, request, "matches")
        assert [(row["path"], row["line"], row["text"]) for row in matches] == [
            ("a.py", 1, "import os"), ("src/b.py", 1, "import os"), ("src/deep/c.py", 1, "import os"), ("src/x.txt", 1, "import os"),
        ]  # fmt: skip
    answer = await host.request(verbs.SearchFiles(room, f"{HOME}/g", "import", include="*.{bin,txt}"))
    assert (answer["binary"], answer["unreadable"], len(answer["matches"])) == (0, 1, 1)
    with pytest.raises(InvalidRequestError):
        await host.request(verbs.GlobFiles(room, f"{HOME}/g", "../*"))
    with pytest.raises(InvalidRequestError):
        await host.request(verbs.SearchFiles(room, f"{HOME}/g", "(", regex=True))
    with pytest.raises(FileMissingError):
        await host.request(verbs.GlobFiles(room, f"{HOME}/none", "*"))


async def test_names_are_given_and_taken(host: Host, room: UUID) -> None:
    await host.ok(
        room, "mkdir -p n/tree/sub; cd n; echo a >tree/sub/a; ln -s a tree/link; mkfifo tree/fifo; echo o >other"
    )
    at = f"{HOME}/n"
    await host.request(verbs.MakeDirectory(room, f"{at}/made"))
    await host.request(verbs.MakeDirectory(room, f"{at}/made", parents=True))
    for request, error in (
        (verbs.MakeDirectory(room, f"{at}/made"), ConflictError),
        (verbs.MakeDirectory(room, f"{at}/x/y"), FileMissingError),
        (verbs.MakeDirectory(room, "/etc/mine"), ForbiddenError),
        (verbs.RenamePath(room, f"{at}/other", f"{at}/tree/sub/a"), ConflictError),
        (verbs.RenamePath(room, f"{at}/none", f"{at}/z"), FileMissingError),
        (verbs.CopyPath(room, f"{at}/tree", f"{at}/copied"), InvalidRequestError),
        (verbs.CopyPath(room, f"{at}/tree", f"{at}/tree/sub/in", recursive=True), InvalidRequestError),
        (verbs.CopyPath(room, f"{at}/other", f"{at}/tree/sub/a"), ConflictError),
        (verbs.CopyPath(room, "/etc/shadow", f"{at}/stolen"), ForbiddenError),
        (verbs.RemovePath(room, f"{at}/tree"), ConflictError),
        (verbs.RemovePath(room, f"{at}/none", recursive=True), FileMissingError),
        (verbs.RemovePath(room, "/etc/passwd"), ForbiddenError),
        (verbs.RemovePath(room, "/", recursive=True), InvalidRequestError),
        (verbs.RenamePath(room, f"{at}/other", "relative"), InvalidRequestError),
    ):
        with pytest.raises(error):
            await host.request(request)
    answer = await host.request(verbs.CopyPath(room, f"{at}/tree", f"{at}/copied", recursive=True))
    assert answer == {"files": 4, "bytes": 2, "skipped": 1}
    await host.request(verbs.RenamePath(room, f"{at}/other", f"{at}/copied/sub/a", replace=True))
    await host.request(verbs.RemovePath(room, f"{at}/tree", recursive=True))
    assert (await host.ok(room, "cd n; find . | sort; cat copied/sub/a; stat -c %U copied")).text == (
        ".\n./copied\n./copied/link\n./copied/sub\n./copied/sub/a\n./made\no\nuser\n"
    )


async def unpack(host: Host, room: UUID, path: str, *pieces: bytes, end: bool = True) -> dict[str, Any]:
    request = verbs.UnpackTree(room, path)
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        for piece in pieces:
            await call.send_data(piece)
        if not end:
            return {}
        await call.send_end()
        return await call.result()


async def test_a_tree_goes_out_and_comes_back(host: Host, room: UUID) -> None:
    await host.ok(room, "mkdir -p p/sub; cd p; seq 100000 >sub/numbers; ln -s sub/numbers link; chmod 750 sub")
    packed = bytearray()
    request = verbs.PackTree(room, f"{HOME}/p")
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        async for event in call.events():
            if isinstance(event, Data):
                packed += event.data
        assert await call.result() == {"files": 3, "bytes": 588_895}
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert archive.getnames() == ["link", "sub", "sub/numbers"]
    assert await unpack(host, room, f"{HOME}/back", bytes(packed)) == {"files": 3, "bytes": 588_895, "skipped": 0}
    await host.ok(room, "diff -r p back; test \"$(stat -c '%a %U' back/sub)\" = '750 user'")
    # A part, garbage, or nothing after it: what was there stays, and nothing else is there.
    for pieces, end in (
        ((bytes(packed[:300_000]),), True),
        ((b"garbage" * 1_000,), True),
        ((bytes(packed[:300_000]),), False),
    ):
        if end:
            with pytest.raises(InvalidRequestError):
                await unpack(host, room, f"{HOME}/back", *pieces)
        else:
            await unpack(host, room, f"{HOME}/back", *pieces, end=False)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await host.ok(room, "ls -A back")).text != "link\nsub\n":
            await asyncio.sleep(0.05)
    with pytest.raises(ForbiddenError):
        await unpack(host, room, "/etc/mine", bytes(packed))


@asynccontextmanager
async def watching(host: Host, room: UUID, path: str, *, recursive: bool = True) -> AsyncIterator[AsyncIterator[str]]:
    """Events of a watch, as `type path`, from when it stands."""
    request = verbs.WatchTree(room, path, recursive=recursive)
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        events = aiter(call.events())
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert isinstance(await anext(events), Message)

        async def lines() -> AsyncIterator[str]:
            rest = b""
            async for event in events:
                if isinstance(event, Data):
                    *whole, rest = (rest + event.data).split(b"\n")
                    for line in map(json.loads, whole):
                        told = [line["type"], line.get("from"), line.get("path")]
                        yield " ".join(part.removeprefix(path + "/") for part in told if part)

        yield lines()


async def expect(events: AsyncIterator[str], *wanted: str) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        for one in wanted:
            assert await anext(events) == one


async def until(events: AsyncIterator[str], wanted: str) -> set[str]:
    seen: set[str] = set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while wanted not in seen:
            seen.add(await anext(events))
    return seen


async def test_a_watch_tells_what_happens(host: Host, room: UUID) -> None:
    await host.ok(room, "mkdir -p w/sub; echo 1 >w/kept")
    async with watching(host, room, f"{HOME}/w") as events:
        await host.ok(room, "echo 2 >w/new")
        await expect(events, "created new")
        await host.ok(room, "echo 3 >>w/kept; echo 4 >>w/kept")
        await expect(events, "modified kept")
        await host.ok(room, "mv w/new w/sub/renamed")
        await expect(events, "moved new sub/renamed")
        await host.ok(room, "rm w/sub/renamed")
        await expect(events, "deleted sub/renamed")
        await host.write(room, f"{HOME}/w/sub/uploaded", b"x")
        await expect(events, "created sub/uploaded")
        await host.write(room, f"{HOME}/w/sub/uploaded", b"y")
        await expect(events, "modified sub/uploaded")
        await host.ok(room, "mkdir -p w/a/b/c; echo 5 >w/a/b/c/leaf")
        await until(events, "created a/b/c/leaf")
        await host.ok(room, "echo 6 >>w/a/b/c/leaf")
        await until(events, "modified a/b/c/leaf")
        await host.ok(room, "rm -r w")
        seen = set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            async for event in events:  # and it ends with the directory
                seen.add(event)
        assert f"deleted {HOME}/w" in seen


async def test_a_watch_is_the_users_and_one_of_few(host: Host, room: UUID) -> None:
    await host.ok(room, "mkdir -p v; touch v/file")
    for path, error in (
        ("/root", ForbiddenError),
        (f"{HOME}/v/file", InvalidRequestError),
        (f"{HOME}/v/none", FileMissingError),
    ):
        with pytest.raises(error):
            async with watching(host, room, path):
                pass
    calls = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        for _ in range(8):
            call = watching(host, room, f"{HOME}/v")
            await call.__aenter__()
            calls.append(call)
        with pytest.raises(RateLimitedError):
            async with watching(host, room, f"{HOME}/v"):
                pass
        for call in calls:
            await call.__aexit__(None, None, None)
        while host.machine(room).watches:
            await asyncio.sleep(0.01)
    async with watching(host, room, f"{HOME}/v"):
        pass


async def test_a_reader_that_falls_behind_hears_that_it_did(host: Host, room: UUID) -> None:
    await host.ok(room, "mkdir -p flood")
    name = "n" * 200
    async with watching(host, room, f"{HOME}/flood") as events:
        await host.ok(
            room,
            f"cd flood; python3 -c \"import os\nfor i in range(20000): f='{name}%d'%(i%50); open(f,'w').close(); os.unlink(f)\"",
        )
        await until(events, "overflow")
        await host.ok(room, "touch flood/after")
        await until(events, "created after")


async def test_the_daemon_outlives_a_guest_that_goes_in_the_middle(host: Host) -> None:
    doomed = await host.ensure()
    await host.ok(doomed, "mkdir w")
    async with watching(host, doomed, f"{HOME}/w") as events:
        await host.destroy(doomed)
        with pytest.raises(InnkeeperError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                await anext(events)
