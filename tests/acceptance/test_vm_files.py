"""Files of VMs with the clients that use them: InstaVM's own SDK, curl, and `inn cp`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
import pytest
from instavm_client import Instavm
from server_fixture import Server, until

pytestmark = pytest.mark.microvms

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def session(instavm: Instavm) -> Iterator[str]:
    """A session of the SDK's, which gets its VM on first use."""
    session_id: str = instavm.sdk("answer = client.start_session()")
    yield session_id
    instavm.sdk("client.kill(words[0])", session_id)


@pytest.fixture(scope="module")
def vm(innkeeper: Server) -> Iterator[str]:
    """A VM's id."""
    client = innkeeper.client()
    made = client.post("/v1/vms", json={"vm_lifetime_seconds": 3_600}).json()
    yield made["vm_id"]
    assert client.delete(f"/v1/vms/{made['vm_id']}").status_code == 200


@pytest.fixture
def files(innkeeper: Server, vm: str) -> Files:
    return Files(innkeeper.client(), vm)


class Files:
    """A VM's files as a client has them."""

    def __init__(self, client: httpx2.Client, vm_id: str) -> None:
        self.client = client
        self.root = f"/v1/vms/{vm_id}/files"

    def get(self, leaf: str = "", **query: Any) -> httpx2.Response:
        return self.client.get(f"{self.root}{leaf}", params=query)

    def put(self, path: str, content: bytes, leaf: str = "/content", **query: Any) -> httpx2.Response:
        return self.client.put(f"{self.root}{leaf}", params={"path": path, **query}, content=content)

    def post(self, leaf: str, **body: Any) -> httpx2.Response:
        return self.client.post(f"{self.root}/{leaf}", json=body)

    def names(self, path: str) -> list[str]:
        answer = self.get(path=path)
        assert answer.status_code == 200, answer.text
        return [row["name"] for row in answer.json()["entries"]]


SEND_AND_FETCH = """
client.session_id, folder = words
sent = client.upload_file(folder + "/größe.bin", "data/")
client.download_file("data/größe.bin", folder + "/relative")
saved = client.download_file(sent["path"], folder + "/back")
tree = client.upload_file(folder + "/tree.tar.gz", "/srv/tree", recursive=True)
client.download_file("/srv/tree/sub/back", folder + "/from-tree")
refused = []
for use in (
    lambda: client.download_file("/no/such/file"),
    lambda: client.upload_file(folder + "/broken", "/srv/broken", recursive=True),
    lambda: client.download_file("/srv/broken/sub/back"),
):
    try:
        use()
    except instavm.InstaVMError as error:
        refused.append(str(error))
answer = sent, saved, tree, refused
"""


def test_the_sdk_sends_and_fetches(instavm: Instavm, session: str, tmp_path: Path) -> None:
    content = os.urandom(5 * MEBIBYTE + 1)
    (tmp_path / "größe.bin").write_bytes(content)
    with tarfile.open(tmp_path / "tree.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "größe.bin", "sub/back")
    (tmp_path / "broken").write_bytes((tmp_path / "tree.tar.gz").read_bytes()[:100_000])
    sent, saved, tree, refused = instavm.sdk(SEND_AND_FETCH, session, str(tmp_path))
    assert (sent["status"], sent["size"], sent["created"]) == ("success", len(content), True)
    assert sent["path"].endswith("/data/größe.bin") and saved["size"] == len(content)
    assert (tree["files"], tree["skipped"]) == (1, 0)
    for name in ("relative", "back", "from-tree"):
        assert (tmp_path / name).read_bytes() == content, name
    assert ["404" in refused[0], "422" in refused[1], "404" in refused[2]] == [True] * 3, refused


def curl(innkeeper: Server, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", "-H", f"X-API-Key: {innkeeper.token}", *arguments],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_examples_of_the_page(innkeeper: Server, session: str, vm: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello world\n")
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    url = f"{innkeeper.url}/v1/vms/{vm}/files"
    said = curl(innkeeper, "-T", str(tmp_path / "notes.txt"), f"{url}/content?path=/srv/notes.txt").stdout
    assert json.loads(said) == {"path": "/srv/notes.txt", "size": 12, "created": True}
    said = curl(innkeeper, f"{url}/search?path=/srv&query=hello").stdout
    match = {"path": "/srv/notes.txt", "line": 1, "column": 1, "text": "hello world", "cut": False}
    assert json.loads(said) == {
        "matches": [match], "binary": 0, "unreadable": 0, "long_lines": 0, "next_cursor": None,
    }  # fmt: skip
    form = f"session_id={session}"
    # In this order the file comes last, in the other one first.
    fields = ["-F", form, "-F", "remote_path=data.csv", "-F", f"file=@{tmp_path}/data.csv"]
    for order in (fields, fields[4:] + fields[:4]):
        said = json.loads(curl(innkeeper, f"{innkeeper.url}/upload", *order).stdout)
        assert (said["path"], said["size"], said["files"]) == ("/root/data.csv", 8, None)
    said = json.loads(curl(innkeeper, f"{innkeeper.url}/download", "-d", form, "-d", "filename=data.csv").stdout)
    assert said == {"status": "success", "filename": "data.csv", "size": 8, "content": "YSxiCjEsMgo="}


def test_a_file_in_parts_and_by_its_tag(files: Files) -> None:
    content = os.urandom(3 * MEBIBYTE)
    assert files.put("/srv/parts/a", content, mode="0600").json() == {
        "path": "/srv/parts/a", "size": len(content), "created": True,
    }  # fmt: skip
    whole = files.get("/content", path="/srv/parts/a")
    tag = whole.headers["etag"]
    assert whole.content == content
    url = f"{files.root}/content?path=/srv/parts/a"
    for headers, status, expected in (
        ({"Range": "bytes=1000000-2000000"}, 206, content[1_000_000:2_000_001]),
        ({"Range": "bytes=-5"}, 206, content[-5:]),
        ({"If-None-Match": tag}, 304, b""),
    ):
        answer = files.client.get(url, headers=headers)
        assert (answer.status_code, answer.content) == (status, expected)
    assert files.put("/srv/parts/a", content[::-1]).json()["created"] is False
    changed = files.client.get(url, headers={"If-None-Match": tag, "If-Range": tag, "Range": "bytes=0-9"})
    assert (changed.status_code, changed.content) == (200, content[::-1])
    assert files.get("/stat", path="/srv/parts/a").json()["mode"] == "0600"


def test_trees(files: Files) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name in ("src/a.py", "src/deep/b.py", "src/deep/c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"x=1\n"))
    assert files.put("/srv/tree", buffer.getvalue(), "/archive").json() == {
        "path": "/srv/tree", "files": 3, "size": 12, "skipped": 0,
    }  # fmt: skip
    found = files.get("/glob", path="/srv/tree", pattern="**/*.py").json()["entries"]
    assert [row["path"] for row in found] == ["/srv/tree/src/a.py", "/srv/tree/src/deep/b.py"]
    found = files.get("/search", path="/srv/tree", query="^X", regex="true", ignore_case="true", include="*.txt").json()
    assert [(row["path"], row["text"]) for row in found["matches"]] == [("/srv/tree/src/deep/c.txt", "x=1")]
    copied = files.post("copy", path="/srv/tree/src", to="/srv/tree/copy", recursive=True)
    assert (copied.status_code, copied.json()["files"]) == (201, 5)
    assert files.post("copy", path="/srv/tree/src", to="/srv/tree/copy", recursive=True).status_code == 409
    assert files.post("rename", path="/srv/tree/copy", to="/srv/tree/moved").json() == {"path": "/srv/tree/moved"}
    assert files.post("mkdir", path="/srv/tree/new").status_code == 201
    assert files.names("/srv/tree") == ["moved", "new", "src"]
    packed = files.get("/archive", path="/srv/tree/moved").content
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert archive.getnames() == ["a.py", "deep", "deep/b.py", "deep/c.txt"]
    assert files.client.delete(f"{files.root}?path=/srv/tree").status_code == 409
    assert files.client.delete(f"{files.root}?path=/srv/tree&recursive=true").status_code == 200
    assert files.get("/stat", path="/srv/tree").status_code == 404


def test_a_watch_tells_what_others_do(innkeeper: Server, files: Files, vm: str) -> None:
    files.post("mkdir", path="/srv/watched", parents=True)
    events: list[str] = []

    def follow() -> None:
        query = urlencode({"path": "/srv/watched", "recursive": "true"})
        client = innkeeper.client()
        with client.stream("GET", f"{files.root}/watch?{query}") as answer:
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    events.append(value)

    following = threading.Thread(target=follow)
    following.start()
    until(lambda: events == ["watching"])
    files.put("/srv/watched/sub/file", b"1")
    until(lambda: events.count("created") == 2)
    files.put("/srv/watched/sub/file", b"2")
    until(lambda: "modified" in events)
    files.post("rename", path="/srv/watched/sub", to="/srv/watched/moved")
    until(lambda: "moved" in events)
    files.client.delete(f"{files.root}?path=/srv/watched&recursive=true")
    following.join(60)
    assert events[-1] == "end"


def test_inn_cp(innkeeper: Server, files: Files, vm: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a").write_bytes(b"1")
    (tmp_path / "in" / "sub" / os.fsdecode(b"b\xff\n")).write_bytes(os.urandom(100_000))
    done = innkeeper.inn("cp", str(tmp_path / "in"), f"{vm}:/srv/cp")
    assert (done.returncode, done.stderr) == (0, "2 files, 100.0 kB\n")
    done = innkeeper.inn("cp", f"{vm}:/srv/cp", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert [p.read_bytes() for p in sorted((tmp_path / "in").rglob("*")) if p.is_file()] == [
        p.read_bytes() for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()
    ]
    assert innkeeper.inn("cp", str(tmp_path / "in" / "a"), f"{vm}:here").returncode == 0
    assert files.get("/content", path="here").content == b"1"
    gone = innkeeper.inn("cp", f"{vm}:/none", str(tmp_path / "x"))
    assert (gone.returncode, gone.stdout) == (1, "")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) << 10


SIZES = [pytest.param(192, id="192 MiB"), pytest.param(5 * 1024, id="5 GiB", marks=pytest.mark.long)]


@pytest.mark.parametrize("mebibytes", SIZES)
@pytest.mark.timeout(3_600)
def test_a_large_file_takes_no_memory(innkeeper: Server, session: str, files: Files, mebibytes: int) -> None:
    """Both ways, raw and as form and base64, while the memory of every process of the server is looked at."""
    assert innkeeper.process is not None
    pids = {"host": innkeeper.process.pid, "api": innkeeper.api_pid()}
    piece = hashlib.sha256(b"seed").digest() * (MEBIBYTE // 32)
    head = b"".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in (("session_id", session), ("remote_path", "/srv/large"))
    )
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="large"\r\n\r\n'
    memory = {name: [resident_bytes(pid)] for name, pid in pids.items()}

    def note() -> None:
        for name, pid in pids.items():
            memory[name].append(resident_bytes(pid))

    def pieces() -> Iterator[bytes]:
        for _ in range(mebibytes):
            note()
            yield piece

    def form() -> Iterator[bytes]:
        yield head + file
        yield from pieces()
        yield b"\r\n--b--\r\n"

    client = innkeeper.client(timeout_seconds=3_000)
    answer = client.post("/upload", content=form(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 200 and answer.json()["size"] == mebibytes * MEBIBYTE, answer.text
    size = 0
    with client.stream("POST", "/download", data={"session_id": session, "filename": "/srv/large"}) as got:
        for chunk in got.iter_raw(MEBIBYTE):
            size += len(chunk)
            note()
    assert size > mebibytes * MEBIBYTE * 4 // 3
    assert client.put(f"{files.root}/content?path=/srv/large", content=pieces()).status_code == 200
    digest, expected = hashlib.sha256(), hashlib.sha256()
    with client.stream("GET", f"{files.root}/content?path=/srv/large") as got:
        for chunk in got.iter_raw(MEBIBYTE):
            digest.update(chunk)
            note()
    for _ in range(mebibytes):
        expected.update(piece)
    assert digest.digest() == expected.digest()
    client.delete(f"{files.root}?path=/srv/large")
    for name, seen in memory.items():
        assert max(seen) - seen[0] < 100 * MEBIBYTE, (name, seen[0], max(seen))
