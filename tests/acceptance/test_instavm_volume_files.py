"""Files of volumes on a real server, by the unmodified `instavm` package and by our own endpoints: while nobody has the volume, and while a VM has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from instavm_client import Instavm
from server_fixture import Server, server, until

pytestmark = pytest.mark.microvms

MIB = 1 << 20
# The first microVM of a shape waits for its template.
FIRST_GUEST_SECONDS = 250


@pytest.fixture(scope="module")
def client(innkeeper: Server) -> httpx2.Client:
    return innkeeper.client()


@pytest.fixture(scope="module")
def volume(client: httpx2.Client) -> Iterator[str]:
    """A volume for the module; that it can be deleted at its end says that nothing of the server's holds it."""
    made = client.post("/v1/volumes", json={"name": "files", "quota_bytes": 64 * MIB})
    assert made.status_code == 200, made.text
    path = f"/v1/volumes/{made.json()['id']}"
    yield path
    gone = client.delete(path)
    assert (gone.status_code, client.get(path).status_code) == (200, 404), gone.text


def paths(client: httpx2.Client, volume: str, **params: Any) -> list[str]:
    answer = client.get(f"{volume}/files", params=params)
    assert answer.status_code == 200, answer.text
    return [one["path"] for one in answer.json()]


def put(client: httpx2.Client, volume: str, path: str, content: bytes, **params: Any) -> httpx2.Response:
    return client.put(f"{volume}/files/content", params={"path": path, **params}, content=content)


def content(client: httpx2.Client, volume: str, path: str) -> bytes:
    answer = client.get(f"{volume}/files/content", params={"path": path})
    assert answer.status_code == 200, answer.text
    return answer.content


def test_the_sdk_sends_finds_fetches_and_deletes(instavm: Instavm, volume: str, tmp_path: Path) -> None:
    source = tmp_path / "report.bin"
    source.write_bytes(os.urandom(300_000))
    script = """
volume, source, target = words
files = client.volumes
first = files.upload_file(volume, source, 'in/a/report.bin')
try:
    files.upload_file(volume, source, 'in/a/report.bin')
    refused = None
except Exception as error:
    refused = str(error)
again = files.upload_file(volume, source, 'in/a', overwrite=True)
listed = files.list_files(volume, prefix='in/')
saved = files.download_file(volume, 'in/a/report.bin', local_path=target)
gone = files.delete_file(volume, 'in/a/report.bin')
answer = [first, refused, again, listed, saved['saved_bytes'], gone, files.list_files(volume, prefix='in/')]
"""
    target = tmp_path / "fetched"
    first, refused, again, listed, saved, gone, left = instavm.sdk(
        script, volume.rpartition("/")[2], str(source), str(target)
    )
    assert (first["path"], first["created"], again["path"], again["created"]) == (
        "in/a/report.bin", True, "in/a/report.bin", False,
    )  # fmt: skip
    assert "409" in refused
    assert [(one["path"], one["type"], one["size"]) for one in listed] == [
        ("in/a", "dir", listed[0]["size"]),
        ("in/a/report.bin", "file", 300_000),
    ]
    assert saved == 300_000 and target.read_bytes() == source.read_bytes()
    assert gone["status"] == "deleted" and [one["path"] for one in left] == ["in/a"]


def test_prefixes_limits_ranges_and_what_is_refused(client: httpx2.Client, volume: str) -> None:
    for name in ("p/one.txt", "p/on[e]*.txt", "p/deep/er/x", "q"):
        assert put(client, volume, name, name.encode()).status_code == 200
    assert paths(client, volume, prefix="p/on") == ["p/on[e]*.txt", "p/one.txt"]
    assert paths(client, volume, prefix="p/on[") == ["p/on[e]*.txt"]
    assert paths(client, volume, prefix="p/", recursive="false") == ["p/deep", "p/on[e]*.txt", "p/one.txt"]
    assert paths(client, volume, prefix="p/deep") == ["p/deep", "p/deep/er", "p/deep/er/x"]
    assert paths(client, volume, prefix="nowhere/x") == []
    assert paths(client, volume, prefix="p/", limit=1) == ["p/deep"]
    assert {"p", "q"} <= set(paths(client, volume, recursive="false")) and "lost+found" not in paths(client, volume)
    part = client.get(f"{volume}/files/content", params={"path": "q"}, headers={"Range": "bytes=0-0"})
    assert (part.status_code, part.content) == (206, b"q")
    assert put(client, volume, "q", b"other", overwrite="false").status_code == 409
    assert content(client, volume, "q") == b"q"
    assert client.get(f"{volume}/files/content", params={"path": "none"}).status_code == 404
    assert client.delete(f"{volume}/files", params={"path": "p"}).status_code == 409
    assert client.delete(f"{volume}/files", params={"path": "p", "recursive": "true"}).status_code == 200
    for path in ("..", "../etc/passwd", "a/../../b", "/"):
        assert put(client, volume, path, b"x").status_code == 422, path
    full = put(client, volume, "big", bytes(80 * MIB))
    assert full.status_code == 409, full.text
    assert paths(client, volume) == [path for path in paths(client, volume) if path in ("in", "in/a", "q")]


def test_a_volume_that_a_vm_has(client: httpx2.Client, instavm: Instavm, volume: str) -> None:
    assert put(client, volume, "before", b"before").status_code == 200
    made = client.post(
        "/v1/vms",
        json={
            "image_variant": "base",
            "memory_mb": 512,
            "volumes": [{"volume_id": volume.rpartition("/")[2], "mount_path": "/data"}],
        },
    )
    assert made.status_code == 200, made.text
    vm = made.json()
    run = "client.session_id = words[0]\nanswer = client.execute(words[1], language='bash')['stdout']"
    said = instavm.sdk(
        run, vm["session_id"], "cat /data/before; echo inside > /data/inside; ln -s /etc/hostname /data/link"
    )
    assert said == "before"
    assert content(client, volume, "inside") == b"inside\n"
    assert put(client, volume, "later", b"later").status_code == 200
    assert instavm.sdk(run, vm["session_id"], "cat /data/later") == "later"
    detached = client.delete(
        f"/v1/vms/{vm['vm_id']}/volumes/{volume.rpartition('/')[2]}", params={"mount_path": "/data"}
    )
    assert detached.status_code == 200, detached.text
    # In the guest that has it now, a way out of the volume leads to that guest's own files, not to anybody else's.
    assert {"before", "inside", "later", "link"} <= set(paths(client, volume))
    assert content(client, volume, "inside") == b"inside\n"
    assert client.delete(f"/v1/vms/{vm['vm_id']}").status_code == 200
    assert put(client, volume, "after", b"after").status_code == 200
    assert content(client, volume, "later") == b"later"


@pytest.mark.long
def test_a_guest_of_a_volume_goes_with_its_server(driver: str) -> None:
    """What was acknowledged is there after the server was killed, and the guest that had the volume is not: a server of the test's own."""
    with server("base", driver=driver) as running:
        client = running.client()
        made = client.post("/v1/volumes", json={"name": "kept", "quota_bytes": 64 * MIB}).json()
        volume = f"/v1/volumes/{made['id']}"
        until(lambda: put(client, volume, "kept", b"kept").status_code == 200, seconds=FIRST_GUEST_SECONDS)
        running.kill()
        running.start()
        until(lambda: client.get(f"{volume}/files/content", params={"path": "kept"}).status_code == 200, seconds=120)
        assert content(client, volume, "kept") == b"kept"
        assert client.delete(volume).status_code == 200
