"""Files of VMs over HTTP: what goes to the host and what comes back, and every way a body can be wrong."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from innkeeper.core.host_verbs import WriteFile
from innkeeper.core.tree_verbs import CopyPath, GlobFiles, RenamePath, SearchFiles, UnpackTree
from innkeeper.errors import GuestError

pytestmark = pytest.mark.anyio

PATIENCE_SECONDS = 10


@pytest.fixture
async def vm(api: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/vms", json={})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    entry = api.world.control.live.find((UUID(made["session_id"]), ""))
    api.world.host.files[entry.instance.id, "/tmp/a"] = b"0123456789"
    return {**made, "files": f"/v1/vms/{made['vm_id']}/files", "instance": entry.instance.id}


def asked(api: Any, verb: type[Any]) -> Any:
    return [request for request in api.world.host.asked if isinstance(request, verb)][-1]


def content(api: Any, vm: dict[str, Any], path: str) -> bytes | None:
    found: bytes | None = api.world.host.files.get((vm["instance"], path))
    return found


async def test_reading_with_conditions_and_ranges(api: Any, vm: dict[str, Any]) -> None:
    url = f"{vm['files']}/content?path=/tmp/a"
    whole = await api.client.get(url)
    tag = whole.headers["etag"]
    assert (whole.content, whole.headers["content-type"]) == (b"0123456789", "text/plain; charset=utf-8")
    assert whole.headers["x-content-type-options"] == "nosniff"
    for headers, status, body in (
        ({"Range": "bytes=2-4"}, 206, b"234"),
        ({"Range": "bytes=-3"}, 206, b"789"),
        ({"Range": "bytes=2-4", "If-Range": tag}, 206, b"234"),
        ({"Range": "bytes=2-4", "If-Range": '"other"'}, 200, b"0123456789"),
        ({"Range": "bytes=2-4", "If-Range": "Sun, 22 Nov 2026 10:00:00 GMT"}, 200, b"0123456789"),
        ({"If-None-Match": tag}, 304, b""),
        ({"If-None-Match": f'"other", W/{tag}'}, 304, b""),
        ({"If-None-Match": "*"}, 304, b""),
        ({"If-None-Match": '"other"'}, 200, b"0123456789"),
    ):
        answer = await api.client.get(url, headers=headers)
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (status, body, tag), headers
    assert (await api.client.get(url, headers={"Range": "bytes=10-"})).status_code == 416
    head = await api.client.head(url)
    assert (head.headers["content-length"], head.headers["etag"], head.content) == ("10", tag, b"")


async def test_writing(api: Any, vm: dict[str, Any]) -> None:
    answer = await api.client.put(f"{vm['files']}/content?path=new.txt&mode=0755", content=b"new")
    assert (answer.status_code, answer.json()) == (200, {"path": "/app/new.txt", "size": 3, "created": True})
    assert asked(api, WriteFile).mode == 0o755 and content(api, vm, "/app/new.txt") == b"new"
    for query in ("", "?path=", "?path=/nul%00", "?path=b64:%25", "?path=/a&mode=9", "?path=/" + "x" * 5_000):
        answer = await api.client.put(f"{vm['files']}/content{query}", content=b"x")
        assert answer.status_code == 422 and answer.json()["detail"][0]["loc"], query


@pytest.mark.parametrize("name", ["If-Match", "If-None-Match", "If-Unmodified-Since", "Content-Range"])
async def test_a_condition_that_is_not_looked_at_writes_nothing(api: Any, vm: dict[str, Any], name: str) -> None:
    for what in ("content", "archive"):
        answer = await api.client.put(f"{vm['files']}/{what}?path=/tmp/a", content=b"new", headers={name: "*"})
        assert answer.status_code == 422 and name in answer.text, answer.text
    assert content(api, vm, "/tmp/a") == b"0123456789"


async def test_any_path_survives(api: Any, vm: dict[str, Any]) -> None:
    for path in ("/tmp/a b&c=d", "/tmp/new\nline", "/tmp/é", "b64:L3RtcC//", "/tmp/../tmp/x"):
        answer = await api.client.put(f"{vm['files']}/content", params={"path": path}, content=path.encode())
        assert answer.status_code == 200 and answer.json()["path"] == path
        again = await api.client.get(f"{vm['files']}/content", params={"path": path})
        assert again.content == path.encode()
    listed = (await api.client.get(vm["files"], params={"path": "/tmp"})).json()["entries"]
    assert ("new\nline", "/tmp/new\nline") in [(row["name"], row["path"]) for row in listed]


async def test_trees(api: Any, vm: dict[str, Any]) -> None:
    files = vm["files"]
    found = (await api.client.get(f"{files}/glob?path=/tmp&pattern=*&limit=7")).json()
    assert (found["unreadable"], found["next_cursor"], asked(api, GlobFiles).limit) == (1, "more", 7)
    assert found["entries"] == [
        {
            "name": "a",
            "path": "/tmp/a",
            "type": "file",
            "size": 10,
            "mode": "0644",
            "modified_at": "1970-01-01T00:00:00Z",
        }
    ]
    found = (await api.client.get(f"{files}/search?path=/tmp&query=234&regex=true&include=*.x")).json()
    assert found["matches"] == [{"path": "/tmp/a", "line": 1, "column": 1, "text": "0123456789", "cut": False}]
    assert (found["binary"], found["unreadable"], found["long_lines"], found["next_cursor"]) == (1, 2, 3, None)
    assert (asked(api, SearchFiles).regex, asked(api, SearchFiles).include) == (True, "*.x")
    made = await api.client.post(f"{files}/copy", json={"path": "/tmp/a", "to": "b"})
    assert (made.status_code, made.json()) == (201, {"path": "/app/b", "files": 1, "size": 10, "skipped": 0})
    assert (asked(api, CopyPath).replace, asked(api, CopyPath).recursive) == (False, False)
    taken = await api.client.post(f"{files}/rename", json={"path": "/app/b", "to": "/tmp/a"})
    assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
    moved = await api.client.post(f"{files}/rename", json={"path": "/app/b", "to": "/tmp/a", "replace": True})
    assert (moved.json(), asked(api, RenamePath).to) == ({"path": "/tmp/a"}, "/tmp/a")
    assert (await api.client.post(f"{files}/mkdir", json={"path": "/d"})).status_code == 201
    packed = await api.client.get(f"{files}/archive?path=/tmp/a")
    assert (packed.content, packed.headers["content-type"]) == (b"0123456789", "application/x-tar")
    assert (await api.client.get(f"{files}/archive?path=/none")).status_code == 404
    unpacked = await api.client.put(f"{files}/archive?path=/tmp/d", content=b"tar")
    assert unpacked.json() == {"path": "/tmp/d", "files": 1, "size": 3, "skipped": 0}
    assert (await api.client.delete(f"{files}?path=/tmp/a")).json() == {"path": "/tmp/a"}
    assert (await api.client.delete(f"{files}?path=/tmp/a")).status_code == 404


async def test_a_watch_is_told_as_it_happens_and_ends_with_its_client(api: Any, vm: dict[str, Any]) -> None:
    trees = api.world.host.trees
    entry = api.world.control.live.find((UUID(vm["session_id"]), ""))
    sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    url = f"{vm['files']}/watch"
    scope = {
        "type": "http", "method": "GET", "path": url, "raw_path": url.encode(), "query_string": b"path=/tmp&recursive=true",
        "headers": [(b"x-api-key", api.token.encode())], "client": ("192.0.2.1", 1), "http_version": "1.1",
    }  # fmt: skip
    first = True

    async def with_body() -> dict[str, Any]:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": b"", "more_body": False}
        return await receive()

    serving = asyncio.create_task(api.app(scope, with_body, sent.put))
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert (await sent.get())["status"] == 200
        assert (await sent.get())["body"] == b"event: watching\ndata: {}\n\n"
        assert entry.open_streams == 1
        trees.events.put_nowait({"type": "moved", "path": "/tmp/b\n", "from": "/tmp/a", "directory": False})
        assert (await sent.get())["body"] == (
            b'event: moved\ndata: {"path":"/tmp/b\\n","directory":false,"from":"/tmp/a"}\n\n'
        )
        trees.events.put_nowait({"type": "overflow"})
        assert (await sent.get())["body"] == b"event: overflow\ndata: {}\n\n"
        gone.set()
        await serving
        while trees.watching:
            await asyncio.sleep(0.01)
    assert entry.open_streams == 0


async def test_a_watch_ends_with_the_directory(api: Any, vm: dict[str, Any]) -> None:
    api.world.host.trees.events.put_nowait(None)
    answer = await api.client.get(f"{vm['files']}/watch?path=/tmp")
    assert answer.text == 'event: watching\ndata: {}\n\nevent: end\ndata: {"reason":"gone"}\n\n'


PARTS = {"session_id": "", "remote_path": "/tmp/new", "recursive": "false"}


async def upload(api: Any, vm: dict[str, Any], **changes: Any) -> Any:
    fields = {**PARTS, "session_id": vm["session_id"], **changes}
    given = {name: value for name, value in fields.items() if value is not None}
    return await api.client.post("/upload", data=given, files={"file": ("/home/me/data.csv", b"content")})


async def test_uploads(api: Any, vm: dict[str, Any]) -> None:
    answer = await upload(api, vm)
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "success", "path": "/tmp/new", "size": 7, "created": True, "files": None, "skipped": None},
    )
    assert content(api, vm, "/tmp/new") == b"content"
    assert (await upload(api, vm, remote_path="relative")).json()["path"] == "/app/relative"
    assert (await upload(api, vm, remote_path="/tmp/")).json()["path"] == "/tmp/data.csv"
    archive = (await upload(api, vm, recursive="true")).json()
    assert (archive["path"], archive["files"], archive["created"]) == ("/tmp/new", 1, None)
    assert asked(api, UnpackTree).path == "/tmp/new"
    for changes in (
        {"recursive": "maybe"}, {"remote_path": None}, {"session_id": None}, {"remote_path": ""}, {"remote_path": "/\0"},
        {"remote_path": ["/a", "/b"]}, {"remote_path": "x" * 9_000},
    ):  # fmt: skip
        answer = await upload(api, vm, **changes)
        assert answer.status_code == 422, (changes, answer.text)
        assert answer.json()["detail"][0]["loc"] == ["body", *changes], changes
    for session in ("nonsense", "00000000-0000-4000-8000-000000000000"):
        assert (await upload(api, vm, session_id=session)).status_code == 404


def part(name: str, value: bytes, *, filename: str | None = None) -> bytes:
    named = "" if filename is None else f'; filename="{filename}"'
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + value + b"\r\n"


MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}


async def test_the_file_may_come_first_when_it_is_small(api: Any, vm: dict[str, Any]) -> None:
    after = part("remote_path", b"/tmp/first") + part("session_id", vm["session_id"].encode())
    body = part("file", b"x" * 1_000, filename="f") + after + part("recursive", b"false") + b"--b--"
    answer = await api.client.post("/upload", content=body, headers=MULTIPART)
    assert answer.status_code == 200, answer.text
    assert content(api, vm, "/tmp/first") == b"x" * 1_000
    large = part("file", b"x" * 1_100_000, filename="f") + after + b"--b--"
    answer = await api.client.post("/upload", content=large, headers=MULTIPART)
    assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["body", "file"]


async def test_a_body_that_is_wrong_at_its_end_writes_nothing(api: Any, vm: dict[str, Any]) -> None:
    fields = part("session_id", vm["session_id"].encode()) + part("remote_path", b"/tmp/partial")
    file = part("file", b"x" * 100_000, filename="f")
    for end in (
        b"", b"--b", part("file", b"again") + b"--b--", part("recursive", b"true") + b"--b--", part("remote_path", b"/b") + b"--b--",
        part("other", b"x") * 40 + b"--b--", b"--b--" + b"x" * 200_000,
    ):  # fmt: skip

        async def pieces(body: bytes = fields + file + end) -> AsyncIterator[bytes]:
            for start in range(0, len(body), 30_000):
                yield body[start : start + 30_000]

        answer = await api.client.post("/upload", content=pieces(), headers=MULTIPART)
        assert answer.status_code == 422, (end[:100], answer.text)
        assert content(api, vm, "/tmp/partial") is None
    answer = await api.client.post(
        "/upload", content=fields + file + part("more", b"x") + b"--b--\r\n", headers=MULTIPART
    )
    assert answer.status_code == 200 and content(api, vm, "/tmp/partial") == b"x" * 100_000


async def test_bodies_of_other_kinds_are_refused(api: Any, vm: dict[str, Any]) -> None:
    for kind in (None, "application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 100):
        answer = await api.client.post("/upload", content=b"{}", headers={} if kind is None else {"Content-Type": kind})
        assert answer.status_code == 422, kind
    for kind in (None, "application/json", "text/plain"):
        answer = await api.client.post(
            "/download", content=b"{}", headers={} if kind is None else {"Content-Type": kind}
        )
        assert answer.status_code == 422, kind


async def test_downloads(api: Any, vm: dict[str, Any]) -> None:
    form = {"session_id": vm["session_id"], "filename": "/tmp/a"}
    answer = await api.client.post("/download", data=form)
    assert answer.json() == {
        "status": "success", "filename": "/tmp/a", "size": 10, "content": base64.b64encode(b"0123456789").decode(),
    }  # fmt: skip
    for size in (0, 1, 2, 3, 196_607, 196_608, 196_609, 1_000_000):
        api.world.host.files[vm["instance"], "/tmp/a"] = bytes(index % 251 for index in range(size))
        answer = await api.client.post("/download", data=form)
        assert base64.b64decode(answer.json()["content"]) == api.world.host.files[vm["instance"], "/tmp/a"], size
    assert (await api.client.post("/download", data={**form, "filename": "/none"})).status_code == 404
    for wrong in (
        {"filename": "/a"},
        {"session_id": vm["session_id"]},
        {**form, "filename": ["/a", "/b"]},
        {**form, "filename": ""},
    ):
        assert (await api.client.post("/download", data=wrong)).status_code == 422, wrong
    api.world.host.read_error = GuestError("broken")
    answer = await api.client.post("/download", data=form)
    assert (answer.status_code, json.loads(answer.text)["code"]) == (503, "service_unavailable")
