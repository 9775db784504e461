"""The leak check finds each thing that a server can leave, and nothing of another server."""

import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from tests import leaks

from innkeeper.host.linux import loop_device, mounts, netns, nftables
from innkeeper.host.linux.cgroup import CgroupTree

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to leave things behind")]

Leak = Callable[[Path], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def process(home: Path) -> AsyncIterator[None]:
    # A command line that names the state directory, as runsc's and the scanner's do, of a program that waits.
    argv = ["sh", "-c", "read line", f"{home}/host/agent/inn-agent"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as child:  # noqa: ASYNC220 - a blocking start of a millisecond
        yield
        child.kill()


@asynccontextmanager
async def mount(home: Path) -> AsyncIterator[None]:
    target = home / "host" / "mounts" / "images"
    target.mkdir(parents=True)
    mounts.mount("none", target, "tmpfs")
    try:
        yield
    finally:
        await mounts.umount(target)


@asynccontextmanager
async def loop(home: Path) -> AsyncIterator[None]:
    file = home / "disk.img"
    file.write_bytes(bytes(1 << 20))
    with loop_device.attach(file):
        yield


@asynccontextmanager
async def namespace(home: Path) -> AsyncIterator[None]:
    name = f"ik{leaks.server_id(home)}-n0"
    await netns.ip_batch([f"netns add {name}"])
    try:
        yield
    finally:
        await netns.delete(name)


@asynccontextmanager
async def group(home: Path) -> AsyncIterator[None]:
    group = CgroupTree.detect().server_root(f"innkeeper-{leaks.server_id(home)}")
    group.create()
    try:
        yield
    finally:
        await group.remove()


@asynccontextmanager
async def table(home: Path) -> AsyncIterator[None]:
    name = f"innkeeper_{leaks.server_id(home)}"
    await nftables.apply(f"table ip {name} {{}}")
    try:
        yield
    finally:
        await nftables.apply(f"delete table ip {name}")


@asynccontextmanager
async def unix_socket(home: Path) -> AsyncIterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{home}/s")
        listener.listen()
        yield


@asynccontextmanager
async def record(home: Path) -> AsyncIterator[None]:
    folder = home / "host" / "machines" / "0123"
    folder.mkdir(parents=True)
    yield
    folder.rmdir()


@pytest.mark.parametrize("leak", [process, mount, loop, namespace, group, table, unix_socket, record])
async def test_what_is_left_is_found_and_only_by_its_own_tests(leak: Leak, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    assert leaks.leftovers(tmp_path) == []
    async with leak(mine):
        found = leaks.leftovers(mine)
        assert len(found) == 1, found
        assert leaks.leftovers(tmp_path) == found
        assert leaks.leftovers(other) == []
    assert leaks.wait_for_none(tmp_path) == []
