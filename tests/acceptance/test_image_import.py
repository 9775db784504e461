"""`inn image import` as a user types it: an archive becomes a room; a server that is killed in the middle leaves nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from server_fixture import Server, server
from tests.integration import oci_fixture as oci
from tests.integration.oci_fixture import file, layer

pytestmark = [
    pytest.mark.skipif(oci.NEEDS_TOOLS, reason="needs skopeo and umoci"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def innkeeper() -> Iterator[Server]:
    with server("base") as running:
        yield running


def layout(tmp_path: Path) -> oci.Layout:
    made = oci.Layout()
    config = {"User": "1234:77", "Env": ["A=of the image", "PATH=/"], "WorkingDir": "/work", "Cmd": ["probe"]}
    entries = [("probe", file(oci.program(tmp_path), mode=0o755)), ("work/f", file(b"x", uid=1234))]
    return made.index(made.image([layer(entries)], config))


def test_an_archive_and_a_folder_become_a_room(innkeeper: Server, tmp_path: Path) -> None:
    made = layout(tmp_path)
    (tmp_path / "app.tar").write_bytes(made.archive())
    done = innkeeper.inn("image", "import", "app:1", f"oci-archive:{tmp_path / 'app.tar'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unpacking" in done.stdout and "imported app:1" in done.stdout
    done = innkeeper.inn("image", "import", "same", f"oci:{made.write(tmp_path / 'layout')}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "imported app:1" in innkeeper.inn("image", "import", "app:1", "--log").stdout
    shown = innkeeper.inn("image", "show", "app:1").stdout
    assert "1234:77" in shown and "import" in shown
    assert innkeeper.inn("profile", "create", "app", "--image", "app:1", "--warm-pool-size", "1").returncode == 0
    ran = innkeeper.inn("run", "app", "r", "probe", "one")
    assert ran.stdout == "uid=1234 gid=77 cwd=/work A=of the image args=[one]\n", ran.stderr
    refused = innkeeper.inn("run", "app", "r", "echo", "a;b")
    assert refused.returncode != 0 and "no shell" in refused.stderr
    assert "profile 'app'" in innkeeper.inn("image", "rm", "app:1").stderr
    api = innkeeper.api()
    digest = {one["name"]: one["digest"] for one in api.client.get("/v1/images").json()}
    assert digest["app:1"] == digest["same"]
    assert innkeeper.inn("image", "rm", "same").returncode == 0
    assert (innkeeper.home / "host" / "images" / f"{digest['same']}.erofs").exists()


def test_what_the_command_line_refuses(innkeeper: Server, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not a tar")
    for source, reason in (
        (f"oci-archive:{tmp_path / 'nosuch'}", "is not a file"),
        (f"oci:{tmp_path}", "not an OCI layout"),
        (str(tmp_path / "x"), "say what"),
        ("dir:/etc", "not an image in a registry"),
        (f"docker-archive:{tmp_path / 'x'}", "skopeo"),
        ("docker://10.0.0.1:5000/a", "no public address"),
    ):
        done = innkeeper.inn("image", "import", "bad", source)
        assert done.returncode != 0, source
        assert reason in done.stderr, (source, done.stderr)
    assert innkeeper.inn("image", "rm", "bad").returncode == 0


def test_killed_in_the_middle(innkeeper: Server) -> None:
    """An upload that does not end, and a `kill -9`: afterwards the image is said to have failed, and nothing of it is there."""
    disks = innkeeper.home / "host" / "pool" / "disks"
    before = set(disks.iterdir())
    stop = threading.Event()

    def pieces() -> Iterator[bytes]:
        while not stop.is_set():
            yield bytes(65_536)
            time.sleep(0.05)

    def upload() -> None:
        with contextlib.suppress(httpx2.TransportError):
            innkeeper.client().put("/v1/images/half/archive", content=pieces())

    uploading = threading.Thread(target=upload)
    uploading.start()
    deadline = time.monotonic() + 60
    while not set(disks.iterdir()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    innkeeper.kill()
    stop.set()
    uploading.join()
    innkeeper.start()
    image = innkeeper.api().client.get("/v1/images/half").json()
    assert image["status"] == "failed"
    # Whichever of the two processes went first.
    assert image["last_error"] in (
        "The server ended while the image was being made",
        "The connection to the host was lost",
    )
    assert not list((innkeeper.home / "host" / "images").glob(".build-*"))
    hosts = innkeeper.inn("host", "list", "--json").stdout
    assert '"leaked": 0' in hosts
    assert innkeeper.inn("image", "rm", "half").returncode == 0
