"""Files of a room: read, written and listed over HTTP."""

from __future__ import annotations

import base64
import hashlib
import os

import pytest
from server_fixture import Api, Room

pytestmark = pytest.mark.microvms

HOME = "/home/user"
MEBIBYTE = 1 << 20


def test_text_is_answered_as_json(shared: Room) -> None:
    shared.output("printf 'Grüße \\\\ \"quoted\"\\n' > text.txt")
    answer = shared.file(f"{HOME}/text.txt")
    assert answer.status_code == 200
    assert answer.json() == {
        "file_path": f"{HOME}/text.txt",
        "content": 'Grüße \\ "quoted"\n',
        "instance_id": shared.create()["instance_id"],
        "encoding": "utf-8",
    }


def test_what_is_not_utf8_is_answered_as_base64(shared: Room) -> None:
    content = os.urandom(700_000)
    assert shared.put(f"{HOME}/noise.bin", content).status_code == 201
    answer = shared.file(f"{HOME}/noise.bin").json()
    assert answer["encoding"] == "base64" and base64.b64decode(answer["content"], validate=True) == content


def test_an_empty_file(shared: Room) -> None:
    shared.put(f"{HOME}/empty", b"")
    assert shared.file(f"{HOME}/empty").json()["content"] == ""
    assert shared.file(f"{HOME}/empty", raw=1).content == b""


def test_what_cannot_be_read_says_why(shared: Room) -> None:
    missing = shared.file("/no/such file")
    assert missing.status_code == 404
    assert missing.json() == {"error": "file_not_found", "message": "File '/no/such file' not found"}
    for path, status, code in (
        (HOME, 400, "invalid_request"),
        ("/etc/shadow", 403, "forbidden"),
        ("/dev/null", 400, "invalid_request"),
    ):
        answer = shared.file(path)
        assert (answer.status_code, answer.json()["error"]) == (status, code), (path, answer.text)


def test_over_16_mebibytes_the_raw_form_is_named(shared: Room) -> None:
    shared.output("head -c 16777216 /dev/zero > just; head -c 16777217 /dev/zero > over")
    assert len(shared.file(f"{HOME}/just").json()["content"]) == 16 * MEBIBYTE
    answer = shared.file(f"{HOME}/over")
    assert (answer.status_code, answer.json()["error"]) == (413, "payload_too_large")
    assert "raw=1" in answer.json()["message"]
    assert len(shared.file(f"{HOME}/over", raw=1).content) == 16 * MEBIBYTE + 1


def test_large_files_go_in_and_out_unchanged(shared: Room) -> None:
    content = os.urandom(MEBIBYTE) * 100
    digest = hashlib.sha256(content).hexdigest()
    written = shared.put(f"{HOME}/new/folder/large.bin", content)
    assert (written.status_code, written.json()["size"], written.json()["created"]) == (201, len(content), True)
    assert shared.output("sha256sum new/folder/large.bin | cut -d' ' -f1", timeout=60) == digest
    assert hashlib.sha256(shared.file(f"{HOME}/new/folder/large.bin", raw=1).content).hexdigest() == digest


def test_a_file_is_replaced_whole_and_keeps_its_mode(shared: Room) -> None:
    shared.output("echo '#!/bin/sh' > script; chmod 755 script")
    written = shared.put(f"{HOME}/script", b"#!/bin/sh\necho new\n")
    assert (written.status_code, written.json()["created"]) == (200, False)
    assert shared.output("./script; stat -c '%a %U' script") == "new\n755 user"


def test_an_upload_that_breaks_off_leaves_nothing(shared: Room) -> None:
    shared.put(f"{HOME}/whole", b"whole")

    class BrokenError(Exception):
        pass

    def pieces() -> object:
        yield b"half"
        raise BrokenError

    with pytest.raises(BrokenError):
        shared.client.put(f"{shared.path}/file{HOME}/whole", content=pieces())  # type: ignore[arg-type]
    assert shared.output("cat whole; ls -a | grep -c whole") == "whole1"


def test_where_nothing_can_be_written(shared: Room) -> None:
    for path, status in (("/etc/passwd", 403), (f"{HOME}/", 400), (HOME, 400)):
        answer = shared.put(path, b"x")
        assert answer.status_code == status and set(answer.json()) == {"error", "message"}, (path, answer.text)


def test_raw_ranges(shared: Room) -> None:
    shared.put(f"{HOME}/digits", b"0123456789")
    url = f"{shared.path}/file{HOME}/digits?raw=1"
    for asked, content, range_ in (
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-2", b"89", "bytes 8-9/10"),
        ("bytes=5-500", b"56789", "bytes 5-9/10"),
    ):
        answer = shared.client.get(url, headers={"Range": asked})
        assert (answer.status_code, answer.content, answer.headers["Content-Range"]) == (206, content, range_)
    beyond = shared.client.get(url, headers={"Range": "bytes=10-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, "bytes */10")


def test_a_directory_is_listed_in_pages(shared: Room) -> None:
    shared.output("mkdir list; cd list; touch c; mkdir a; ln -s a b; printf 12345 > $'d\\xff'; chmod 640 c")
    listing = shared.client.get(f"{shared.path}/files{HOME}/list").json()
    assert (listing["file_path"], listing["next_cursor"]) == (f"{HOME}/list", None)
    rows = [(row["name"], row["type"], row["path"]) for row in listing["entries"]]
    assert rows == [
        ("a", "dir", f"{HOME}/list/a"),
        ("b", "symlink", f"{HOME}/list/b"),
        ("c", "file", f"{HOME}/list/c"),
        ("d\N{REPLACEMENT CHARACTER}", "file", f"{HOME}/list/d%FF"),
    ]
    assert (listing["entries"][2]["mode"], listing["entries"][3]["size"]) == ("0640", 5)
    assert shared.client.get(f"{shared.path}/file{rows[3][2]}").json()["content"] == "12345"
    names, cursor = [], None
    while True:
        params = {"limit": 3, **({} if cursor is None else {"cursor": cursor})}
        page = shared.client.get(f"{shared.path}/files{HOME}/list", params=params).json()
        names += [row["name"] for row in page["entries"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert names == [row[0] for row in rows]
    assert shared.client.get(f"{shared.path}/files/nowhere").json()["error"] == "file_not_found"
    assert shared.client.get(f"{shared.path}/files{HOME}/list/c").status_code == 400
    assert {"etc", "home", "usr"} <= {
        row["name"] for row in shared.client.get(f"{shared.path}/files").json()["entries"]
    }


def test_nothing_makes_a_room_but_asking_for_one(api: Api, base: str) -> None:
    missing = api.room(base)
    for method, tail in (
        ("GET", "/file/etc/hostname"),
        ("GET", "/file/etc/hostname?raw=1"),
        ("PUT", "/file/home/user/x"),
        ("GET", "/files/"),
        ("GET", "/tools"),
        ("GET", "/command/5f9d3fb0-0000-4000-8000-000000000000/output"),
        ("DELETE", ""),
    ):
        answer = api.client.request(method, missing.path + tail)
        assert (answer.status_code, answer.json()["error"]) == (404, "instance_not_found"), (method, tail, answer.text)
    listed = api.client.get(f"/api/profile/{base}/rooms").json()
    assert missing.room_id not in [room["room_id"] for room in listed]
