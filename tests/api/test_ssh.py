"""The SSH gateway before clients that break rules, from sockets of theirs to a scripted host."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from innkeeper.api.ssh import host_key
from innkeeper.api.ssh.connection import JOIN_BYTES, STRANGER_BYTES, _joined
from innkeeper.api.ssh.gateway import ssh_gateway
from innkeeper.api.ssh.limits import STRANGERS, STRANGERS_PER_ADDRESS, ConnectionLimits
from innkeeper.api.ssh.login import CHANNELS, TRIES
from innkeeper.api.v1.vms import vm_record
from innkeeper.control import session_vm, ssh_keys
from innkeeper.control.context import Control
from innkeeper.core.ssh_key import HOST_KEY_FILE
from innkeeper.core.vm import VmRequest, vm_id
from scripted_host import World

pytestmark = pytest.mark.anyio
SECONDS = 60
IGNORED = bytes(1_000)
# An unencrypted packet: a message that everybody has to ignore.
IGNORE = struct.pack(">IBBI", 1_012, 6, 2, 1_000) + IGNORED + bytes(6)


class Gateway:
    """A gateway over a scripted host with one VM, and a client's key that opens it."""

    def __init__(self, world: World, control: Control, port: int, vm: str, key: asyncssh.SSHKey) -> None:
        self.world = world
        self.control = control
        self.port = port
        self.vm = vm
        self.key = key

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    @asynccontextmanager
    async def client(self, key: Any = None, **options: Any) -> AsyncIterator[asyncssh.SSHClientConnection]:
        keys = [self.key] if key is None else key
        connection = await asyncssh.connect(
            "127.0.0.1", self.port, username=self.vm, client_keys=keys, known_hosts=None, agent_path=None, config=None, **options
        )  # fmt: skip
        try:
            yield connection
        finally:
            connection.abort()
            await connection.wait_closed()


@asynccontextmanager
async def gateway(home: Path, **settings: Any) -> AsyncIterator[Gateway]:
    world = World(home)
    (home / "api").mkdir()
    async with world.running(**{"ssh_login_seconds": 600.0, **settings}) as control:
        world.control = control
        view = await session_vm.create(control, world.me, VmRequest(), wait=True)
        key = asyncssh.generate_private_key("ssh-ed25519")
        await ssh_keys.add(control, world.me, key.export_public_key().decode())
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        port = listener.getsockname()[1]
        async with ssh_gateway(control, listener):
            yield Gateway(world, control, port, vm_id(view.vm.instance_id, view.vm.generation), key)


async def ends(reader: asyncio.StreamReader) -> bool:
    """Whether the other side has ended the connection, within the time of a test."""
    async with asyncio.timeout(SECONDS):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65_536):
                pass
    return True


async def test_strangers_have_a_few_places(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        waiting = []
        for _ in range(STRANGERS_PER_ADDRESS):
            reader, writer = await made.raw()
            assert (await reader.readline()).startswith(b"SSH-2.0-")
            waiting.append(writer)
        reader, writer = await made.raw()
        assert await reader.read() == b""
        writer.close()
        assert made.control.metrics.ssh_turned_away == 1
        # One that leaves makes room, and who has shown a key takes none of it.
        waiting.pop().close()
        async with asyncio.timeout(SECONDS):
            while True:
                with contextlib.suppress(OSError, asyncssh.Error):
                    async with made.client(), made.client():
                        break
                await asyncio.sleep(0.05)
        for writer in waiting:
            writer.close()


async def test_a_stranger_cannot_go_on_for_ever(tmp_path: Path) -> None:
    async with gateway(tmp_path, ssh_login_seconds=0.3) as made:
        reader, writer = await made.raw()
        assert await ends(reader)
        writer.close()


async def test_a_stranger_is_read_for_a_while_only(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        reader, writer = await made.raw()
        writer.write(b"SSH-2.0-x\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(2 * STRANGER_BYTES // len(IGNORE)):
                writer.write(IGNORE)
            await writer.drain()
        assert await ends(reader)
        writer.close()


async def test_keys_are_tried_a_few_times(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        wrong = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(TRIES)]
        with pytest.raises(asyncssh.DisconnectError) as caught:
            async with made.client([*wrong, made.key]):
                pass
        assert caught.value.reason == "Too many authentication failures"
        async with made.client([*wrong[1:], made.key]) as connection:
            assert (await connection.run("cat", input="x")).stdout == "x"


async def test_who_takes_nothing_is_sent_little_and_ended(tmp_path: Path) -> None:
    """Though the window that it names has no end."""
    async with gateway(tmp_path, client_timeout_seconds=2.0) as made, made.client() as connection:
        programs = made.world.host.programs
        process = await connection.create_process("yes", encoding=None, window=2**31 - 1)
        await made.world.until(lambda: programs.written > 0)
        connection._transport.pause_reading()  # type: ignore[union-attr]
        async with asyncio.timeout(SECONDS):
            while programs.running:
                await asyncio.sleep(0.05)
        # What the sockets and the bus hold, and not what the window says.
        assert programs.written < 64 << 20
        process.close()


async def test_a_program_that_takes_nothing_stops_its_client(tmp_path: Path) -> None:
    """And neither its signals nor other sessions of the connection."""
    async with gateway(tmp_path) as made, made.client() as connection:
        made.world.host.programs.take = False
        process = await connection.create_process("sleep", encoding=None)
        process.stdin.write(bytes(64 << 20))
        await made.world.until(lambda: made.world.host.programs.running == 1)
        process.send_signal("TERM")
        made.world.host.programs.take = True
        assert (await connection.run("cat", input="x")).stdout == "x"
        ended = await asyncio.wait_for(process.wait(), SECONDS)
        assert ended.exit_signal is not None and ended.exit_signal[0] == "TERM"


async def test_channels_have_an_end(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made, made.client() as connection:
        made.world.host.programs.take = False
        for _ in range(CHANNELS):
            await connection.create_process("sleep")
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.create_process("sleep")


async def test_only_variables_of_languages_arrive(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made, made.client() as connection:
        sent = {**{f"X{number}": "x" * 100 for number in range(500)}, "LD_PRELOAD": "/x.so"}
        env = {"LANG": "C.UTF-8", "LC_ALL": "C;id", **sent}
        assert (await connection.run("cat", input="x", env=env)).stdout == "x"
        (asked,) = [request for request in made.world.host.asked if type(request).__name__ == "RunProgram"]
        assert asked.env == {"LANG": "C.UTF-8"}


def test_bytes_that_wait_one_by_one_are_put_together() -> None:
    waiting: list[tuple[bytes, int | None]] = []
    for _ in range(10 * JOIN_BYTES):
        if not _joined(True, waiting, b"x", None):
            waiting.append((b"x", None))
    assert len(waiting) == 10 and sum(len(data) for data, _ in waiting) == 10 * JOIN_BYTES
    assert not _joined(False, waiting, b"x", None) and not _joined(True, waiting, b"x", 1)


def test_places_are_counted_by_address() -> None:
    limits = ConnectionLimits(STRANGERS + 4, STRANGERS_PER_ADDRESS)
    places = [limits.enter(f"192.0.2.{number}") for number in range(STRANGERS)]
    assert all(places) and limits.enter("198.51.100.1") is None
    for place in places:
        assert place is not None
        place.known()
    more = [limits.enter("2001:db8::1"), limits.enter("2001:db8::2")]
    assert all(more) and limits.enter("192.0.2.1") and limits.enter("192.0.2.1") and not limits.enter("192.0.2.2")
    for place in (*places, *more):
        assert place is not None
        place.leave()
        place.leave()
    assert len(limits) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, None),
        ({"ssh_host": "vms.example.com"}, None),
        ({"ssh_port": 22}, "127.0.0.1"),
        ({"ssh_port": 22, "ssh_listen": "192.0.2.1"}, "192.0.2.1"),
        ({"ssh_port": 22, "ssh_listen": "0.0.0.0"}, None),
        ({"ssh_port": 22, "ssh_listen": "::", "ssh_host": "vms.example.com"}, "vms.example.com"),
    ],
)
async def test_vms_say_where_the_gateway_is(tmp_path: Path, settings: dict[str, Any], told: str | None) -> None:
    world = World(tmp_path)
    (tmp_path / "api").mkdir()
    async with world.running(**settings) as control:
        world.control = control
        view = await session_vm.create(control, world.me, VmRequest(), wait=True)
        assert vm_record(control, view).ssh_host == told
        gateway = host_key.ssh_gateway_of(control.settings)
        assert (None if gateway is None else gateway.host) == told


def test_the_host_key_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    first = host_key.private_key(tmp_path)
    assert host_key.private_key(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [HOST_KEY_FILE]
    assert (tmp_path / HOST_KEY_FILE).stat().st_mode & 0o777 == 0o600
