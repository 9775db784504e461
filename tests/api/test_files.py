from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from innkeeper.core.host_verbs import EnsureMachine
from innkeeper.errors import FileMissingError, InvalidRequestError, PayloadTooLargeError

pytestmark = pytest.mark.anyio

NOT_FOUND = {"error": "file_not_found", "message": "File not found."}


@pytest.fixture
async def room(api: Any) -> UUID:
    return UUID((await api.make_room())["instance_id"])


async def test_text_and_other_bytes(api: Any, room: UUID) -> None:
    for data, encoding in (
        ('é"\\\n\0\x7f\u2028'.encode(), "utf-8"),
        (b"", "utf-8"),
        (b"\xff\x00", "base64"),
        ("é".encode()[:1], "base64"),
        ("☃".encode() * 300_000, "utf-8"),
        (b"\xfe" * 1_000_001, "base64"),
    ):
        api.put_file(room, "/tmp/x y", data)
        answer = await api.client.get(f"{api.room}/file/tmp/x%20y")
        body = answer.json()
        content = body.pop("content")
        assert body == {"file_path": "/tmp/x y", "instance_id": str(room), "encoding": encoding}
        assert (base64.b64decode(content) if encoding == "base64" else content.encode()) == data


async def test_a_missing_file_and_a_missing_room(api: Any) -> None:
    answer = await api.client.get(f"{api.room}/file/tmp/x")
    assert (answer.status_code, answer.json()["error"]) == (404, "instance_not_found")
    assert not [r for r in api.world.host.asked if isinstance(r, EnsureMachine)]
    await api.make_room()
    answer = await api.client.get(f"{api.room}/file/tmp/../tmp//x")
    assert (answer.status_code, answer.json()) == (
        404,
        {"error": "file_not_found", "message": "File '/tmp/x' not found"},
    )


@pytest.mark.parametrize(
    ("error", "status", "code", "words"),
    [
        (InvalidRequestError("a directory"), 400, "invalid_request", "directory"),
        (PayloadTooLargeError(), 413, "payload_too_large", "raw=1"),
    ],
)
async def test_what_the_host_refuses(
    api: Any, room: UUID, error: Exception, status: int, code: str, words: str
) -> None:
    api.world.host.read_error = error
    answer = await api.client.get(f"{api.room}/file/tmp")
    assert (answer.status_code, answer.json()["error"]) == (status, code)
    assert words in answer.json()["message"]


async def test_raw(api: Any, room: UUID) -> None:
    api.put_file(room, "/tmp/x", b"0123456789")
    answer = await api.client.get(f"{api.room}/file/tmp/x?raw=1")
    assert (answer.status_code, answer.content) == (200, b"0123456789")
    assert answer.headers["content-length"] == "10"
    part = await api.client.get(f"{api.room}/file/tmp/x?raw=1", headers={"Range": "bytes=2-3"})
    assert (part.status_code, part.content) == (206, b"23")
    assert (await api.client.get(f"{api.room}/file/tmp/x?raw=maybe")).status_code == 400


async def test_put_streams_and_says_whether_it_is_new(api: Any, room: UUID) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for i in range(40):
            yield bytes([i]) * 65_536

    url = f"{api.room}/file/a/%FF.bin"
    first = await api.client.put(url, content=pieces())
    assert first.status_code == 201
    expected = {"file_path": "/a/\N{REPLACEMENT CHARACTER}.bin", "instance_id": str(room), "size": 2_621_440}
    assert first.json() == {**expected, "created": True}
    again = await api.client.put(url, content=b"")
    assert (again.status_code, again.json()["size"], again.json()["created"]) == (200, 0, False)
    for path in ("", "dir/", "%00"):
        assert (await api.client.put(f"{api.room}/file/{path}", content=b"x")).status_code == 400
    too_large = await api.client.put(url, content=b"x", headers={"Content-Length": str(1 << 40)})
    assert (too_large.status_code, too_large.json()["error"]) == (413, "payload_too_large")
    assert too_large.headers["connection"] == "close"


async def test_put_makes_no_room(api: Any) -> None:
    answer = await api.client.put(f"{api.room}/file/x", content=b"x")
    assert (answer.status_code, answer.json()["error"]) == (404, "instance_not_found")


async def test_listing(api: Any, room: UUID) -> None:
    api.put_file(room, "/tmp/a b", b"x")
    body = (await api.client.get(f"{api.room}/files/tmp")).json()
    assert body["file_path"] == "/tmp"
    assert body["entries"] == [
        {
            "name": "a b",
            "path": "/tmp/a%20b",
            "type": "file",
            "size": 1,
            "mode": "0644",
            "modified_at": "1970-01-01T00:00:00Z",
        }
    ]
    assert (await api.client.get(f"{api.room}/files")).json()["file_path"] == "/"
    assert (await api.client.get(f"{api.room}/files/tmp?limit=0")).status_code == 400


async def test_public_files_need_no_token(api: Any, room: UUID) -> None:
    api.put_file(room, "/tmp/a", b"0123456789")
    async with api.anonymous() as client:
        answer = await client.get(f"/vm/{room}/file/tmp/a", headers={"Cookie": "a=b", "Authorization": "Bearer nope"})
        assert (answer.status_code, answer.content) == (200, b"0123456789")
        headers = answer.headers
        assert headers["content-type"] == "text/plain; charset=utf-8"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("sandbox; default-src 'none'")
        assert "allow-" not in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "private, no-store"
        assert headers["accept-ranges"] == "bytes"
        assert "set-cookie" not in headers
        head = await client.head(f"/vm/{room}/file/tmp/a")
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "10")
        assert (await client.get(f"/vm/{room}/file//tmp/a")).status_code == 200


@pytest.mark.parametrize(
    ("asked", "status", "content", "content_range"),
    [
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
        ("bytes=8-", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-100", 206, b"89", "bytes 8-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-100", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=-0", 416, None, "bytes */10"),
        ("bytes=5-2", 200, b"0123456789", None),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("lines=0-1", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
    ],
)
async def test_ranges(
    api: Any, room: UUID, asked: str, status: int, content: bytes | None, content_range: str | None
) -> None:
    api.put_file(room, "/tmp/a", b"0123456789")
    async with api.anonymous() as client:
        answer = await client.get(f"/vm/{room}/file/tmp/a", headers={"Range": asked})
    assert (answer.status_code, answer.headers.get("content-range")) == (status, content_range)
    if content is None:
        assert answer.json()["error"] == "range_not_satisfiable"
    else:
        assert answer.content == content
        assert answer.headers["content-length"] == str(len(content))


async def test_whatever_is_wrong_looks_alike(api: Any, room: UUID) -> None:
    api.put_file(room, "/tmp/a", b"x")
    other = (await api.make_room("gone"))["instance_id"]
    await api.client.delete(f"{api.profile}/room/gone")
    paths = [
        f"/vm/{uuid4()}/file/tmp/a",
        f"/vm/{other}/file/tmp/a",
        f"/vm/{room}/file/tmp/b",
        f"/vm/{room}/file/",
        f"/vm/{room}/file",
        f"/vm/{room}",
        f"/vm/{room}/tmp/a",
        "/vm/x/file/tmp/a",
        "/vm/",
        f"/vm/{room}/file/%00",
        f"/vm/{room}/file/%zz",
        f"/vm/{room}/file/{'x' * 5000}",
    ]
    async with api.anonymous() as client:
        for path in paths:
            answer = await client.get(path)
            assert (answer.status_code, answer.json()) == (404, NOT_FOUND), path
        api.world.host.read_error = FileMissingError("secret reason")
        assert (await client.get(f"/vm/{room}/file/tmp/a")).json() == NOT_FOUND
        api.world.host.read_error = InvalidRequestError("a directory")
        assert (await client.get(f"/vm/{room}/file/tmp")).json() == NOT_FOUND


async def test_public_files_are_limited_per_address(api: Any, room: UUID) -> None:
    limit = api.world.settings.public_files_per_minute
    async with api.anonymous(("198.51.100.1", 1)) as client:
        statuses = [(await client.get("/vm/x")).status_code for _ in range(limit)]
        assert set(statuses) == {404}
        # The bucket refills while the test runs.
        refused = next(a for a in [await client.get("/vm/x") for _ in range(100)] if a.status_code != 404)
    assert (refused.status_code, refused.json()["error"]) == (429, "rate_limited")
    assert int(refused.headers["retry-after"]) >= 1
    async with api.anonymous(("198.51.100.2", 1)) as client:
        assert (await client.get("/vm/x")).status_code == 404
