"""Files over the bus, in real guests: nothing blocks, nothing is followed out of bounds, memory stays bounded."""

import asyncio
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host

from innkeeper.bus.contract import Data
from innkeeper.core import host_verbs as verbs
from innkeeper.core.host_verbs import to_wire
from innkeeper.errors import FileMissingError, InnkeeperError, InvalidRequestError, PayloadTooLargeError

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

MIB = 1_048_576
HOME = "/home/user"


@pytest.fixture(scope="module")
async def room(host: Host) -> UUID:
    return await host.ensure()


async def test_ranges_of_a_file(host: Host, room: UUID) -> None:
    await host.ok(room, "printf 0123456789 > digits.txt")
    said, data = await host.read(room, f"{HOME}/digits.txt")
    assert (data, said["size"], said["mime"], said["bytes"]) == (b"0123456789", 10, "text/plain", 10)
    for offset, length, expected in ((3, 4, b"3456"), (8, 100, b"89"), (10, 1, b""), (99, None, b""), (0, 0, b"")):
        _, data = await host.read(room, f"{HOME}/digits.txt", offset=offset, length=length)
        assert data == expected
    with pytest.raises(PayloadTooLargeError):
        await host.read(room, f"{HOME}/digits.txt", max_bytes=9)
    assert (await host.read(room, f"{HOME}/digits.txt", max_bytes=10))[1] == b"0123456789"


async def test_what_is_no_regular_file_never_blocks(host: Host, room: UUID) -> None:
    await host.ok(
        room, "mkdir -p d; mkfifo fifo; sudo mknod -m 666 full c 1 7; ln -s fifo to-fifo; ln -s loop loop; true"
    )
    async with asyncio.timeout(20):
        for name in ("d", "fifo", "to-fifo", "loop", "/dev/zero", "/dev/full", "/dev/tty"):
            with pytest.raises(InnkeeperError):
                await host.read(room, name if name.startswith("/") else f"{HOME}/{name}")
        for name in ("missing", "d/missing", "digits.txt/below"):
            with pytest.raises((FileMissingError, InvalidRequestError)):
                await host.read(room, f"{HOME}/{name}")
        for wrong in ("relative", "", "/nul\0byte", "b64:%%%", "/" + "x" * 5000):
            with pytest.raises(InvalidRequestError):
                await host.read(room, wrong)
        with pytest.raises(InnkeeperError):
            await host.write(room, f"{HOME}/fifo", b"x")
        with pytest.raises(InnkeeperError):
            await host.write(room, f"{HOME}/d", b"x")


async def test_stat_and_listing(host: Host, room: UUID) -> None:
    await host.ok(room, "mkdir l; cd l; touch b a; mkdir c; ln -s a s; printf x > $'odd\\xff'; chmod 640 a")
    answer = await host.request(verbs.ListFiles(room, f"{HOME}/l"))
    assert [(row["name"], row["type"]) for row in answer["entries"]] == [
        ("a", "file"), ("b", "file"), ("c", "dir"), ("b64:b2Rk/w==", "file"), ("s", "symlink"),
    ]  # fmt: skip
    assert answer["next_cursor"] is None
    first = await host.request(verbs.ListFiles(room, f"{HOME}/l", limit=2))
    rest = await host.request(verbs.ListFiles(room, f"{HOME}/l", cursor=first["next_cursor"]))
    assert first["entries"] + rest["entries"] == answer["entries"]
    status = await host.request(verbs.StatFile(room, f"{HOME}/l/a"))
    assert (status["type"], status["size"], status["mode"] & 0o777, status["uid"]) == ("file", 0, 0o640, 1000)
    with pytest.raises(InvalidRequestError):
        await host.request(verbs.ListFiles(room, f"{HOME}/l/a"))
    with pytest.raises(FileMissingError):
        await host.request(verbs.StatFile(room, f"{HOME}/nowhere"))


async def test_the_profiles_user_reads_and_writes_and_nobody_else(host: Host, room: UUID) -> None:
    assert (await host.read(room, "/etc/passwd"))[0]["bytes"] > 0
    with pytest.raises(InnkeeperError, match="ermission"):
        await host.read(room, "/etc/shadow")
    await host.ok(room, "ln -s /etc/shadow secret; ln -s /etc escape")
    for path in (f"{HOME}/secret", f"{HOME}/escape/shadow"):
        with pytest.raises(InnkeeperError, match="ermission"):
            await host.read(room, path)
    with pytest.raises(InnkeeperError):
        await host.write(room, "/etc/mine", b"x")
    with pytest.raises(InnkeeperError):
        await host.write(room, "/etc/passwd", b"x")
    await host.write(room, f"{HOME}/mine", b"x")
    assert (await host.ok(room, "stat -c '%U %a' mine")).text == "user 644\n"


async def test_200_mib_each_way_in_bounded_memory(host: Host, room: UUID) -> None:
    piece = hashlib.sha256(b"seed").digest() * 32_768
    pieces = 200
    before = resident_mib()
    peak = before
    digest = hashlib.sha256()
    request = verbs.WriteFile(room, f"{HOME}/deep/er/big.bin")
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        for _ in range(pieces):
            await call.send_data(piece)
            digest.update(piece)
            peak = max(peak, resident_mib())
        await call.send_end()
        assert await call.result() == {"bytes": pieces * MIB, "created": True}
    read = hashlib.sha256()
    request = verbs.ReadFile(room, f"{HOME}/deep/er/big.bin")
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        async for event in call.events():
            if isinstance(event, Data):
                read.update(event.data)
                peak = max(peak, resident_mib())
        assert (await call.result())["bytes"] == pieces * MIB
    assert read.digest() == digest.digest()
    assert peak - before < 40, (before, peak)
    await host.ok(room, "rm -r deep")


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def test_a_write_is_whole_or_not_at_all(host: Host, room: UUID) -> None:
    await host.ok(room, "mkdir -p w; printf old > w/kept; chmod 600 w/kept; printf x > w/real; ln -s real w/link")
    request = verbs.WriteFile(room, f"{HOME}/w/kept")
    for name in ("kept", "new"):
        request = verbs.WriteFile(room, f"{HOME}/w/{name}")
        async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
            await call.send_data(bytes(3 * MIB))
    await asyncio.sleep(0.3)
    assert (await host.ok(room, "ls -A w; cat w/kept")).text == "kept\nlink\nreal\nold"
    assert await host.write(room, f"{HOME}/w/kept", b"n", b"ew") == {"bytes": 3, "created": False}
    assert await host.write(room, f"{HOME}/w/link", b"through") == {"bytes": 7, "created": False}
    assert await host.write(room, f"{HOME}/w/script", b"#!/bin/sh\n", mode=0o755) == {"bytes": 10, "created": True}
    assert await host.write(room, f"{HOME}/w/empty") == {"bytes": 0, "created": True}
    assert (await host.ok(room, "cat w/kept w/real; stat -c %a w/kept w/script; readlink w/link")).text == (
        "newthrough600\n755\nreal\n"
    )


async def test_a_full_disk_refuses_a_write_and_leaves_nothing(host: Host) -> None:
    small = await host.ensure(shape=host.shape(disk_mb=256))
    with pytest.raises(InnkeeperError):
        await host.write(small, f"{HOME}/big", *[bytes(MIB)] * 400)
    assert (await host.ok(small, "ls -A | grep -v '^\\.[a-z]'; df --output=pcent / | tail -1")).text.strip() < "50%"
    assert (await host.write(small, f"{HOME}/fits", b"x"))["bytes"] == 1
    await host.destroy(small)


PUBLIC_CASES: list[tuple[str, Mapping[str, Any], bool]] = [
    (f"{HOME}/pub/told", {"public": "reported"}, True),
    (f"{HOME}/pub/told", {"public": "all"}, True),
    (f"{HOME}/pub/told", {"public": "off"}, False),
    (f"{HOME}/pub/told", {"public": "anything"}, False),
    ("/etc/hostname", {"public": "reported"}, False),
    ("/etc/debian_version", {"public": "all"}, True),
    (f"{HOME}/pub/../pub/told", {"public": "reported"}, False),
    (f"{HOME}/pub", {"public": "all"}, False),
    (f"{HOME}/pub/nowhere", {"public": "all"}, False),
    ("/proc/self/environ", {"public": "all"}, False),
    ("/proc/1/cmdline", {"public": "all"}, False),
    ("/sys/kernel/mm/transparent_hugepage/enabled", {"public": "all"}, False),
    ("/dev/null", {"public": "all"}, False),
    ("/run/innkeeper-sudo.sock", {"public": "all"}, False),
    ("/home/../proc/self/environ", {"public": "all"}, False),
    ("//proc/self/environ", {"public": "all"}, False),
    (f"{HOME}/pub/to-proc", {"public": "all"}, False),
    (f"{HOME}/pub/to-proc", {"public": "reported"}, False),
    (f"{HOME}/pub/dir-to-proc/self/environ", {"public": "all"}, False),
    (f"{HOME}/pub/turned", {"public": "reported"}, False),
    (f"{HOME}/pub/fifo", {"public": "all"}, False),
]


@pytest.fixture(scope="module")
async def published(host: Host, room: UUID) -> UUID:
    answer = await host.ok(
        room,
        "mkdir pub; cd pub; echo told > told; ln -s /proc/self/environ to-proc; ln -s /proc dir-to-proc; echo x > turned; mkfifo fifo",
    )
    assert f"{HOME}/pub/turned" in answer.changed
    await host.ok(room, "rm pub/turned; ln -s /etc/shadow pub/turned")
    return room


@pytest.mark.parametrize(("path", "rule", "served"), PUBLIC_CASES)
async def test_public_files(host: Host, published: UUID, path: str, rule: Mapping[str, Any], *, served: bool) -> None:
    async with asyncio.timeout(20):
        if served:
            assert (await host.read(published, path, **rule))[0]["bytes"] > 0
        else:
            with pytest.raises(InnkeeperError):
                await host.read(published, path, **rule)
