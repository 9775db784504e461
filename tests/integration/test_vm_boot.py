"""Guests of microVMs from the first instruction on: what the agent makes of Debian's kernel, an image and a disk, and what it says where it cannot."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.booted_vm import (
    MAC,
    MEMORY_MB,
    NEEDS_QEMU,
    PATIENCE_SECONDS,
    BootedVm,
    booted_vm,
    new_disk,
    request,
    run,
)

from innkeeper.errors import FileMissingError, LinkLostError
from innkeeper.host.change_result import read_changes
from innkeeper.wire.frames import Kind, json_frame
from innkeeper.wire.link import Link
from innkeeper.wire.stream import Data, Message

pytestmark = [pytest.mark.anyio, NEEDS_QEMU]


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedVm]:
    folder = tmp_path_factory.mktemp("vm")
    with booted_vm(folder, disk=new_disk(folder / "disk.ext4"), tap=True) as vm:
        yield vm
        asyncio.run(shut_down_vm(vm))


async def shut_down(link: Link) -> None:
    """The guest may be gone before its answer is."""
    with contextlib.suppress(LinkLostError):
        await request(link, "shutdown", grace_ms=100)


async def shut_down_vm(vm: BootedVm) -> None:
    async with vm.link() as link:
        await shut_down(link)
    assert vm.wait() == 0


async def test_a_guest_is_a_linux_of_its_own(vm: BootedVm) -> None:
    async with vm.link() as link:
        answer = await request(link, "configure", user="user", hostname="box", sudo=True)
        assert (answer["uid"], answer["tmp_is_tmpfs"]) == (1000, False)
        found = await run(
            link,
            "cat /proc/1/comm; uname -r; hostname; awk '$2 == \"/\" {print $3}' /proc/mounts; stat -c %a /dev/shm; cat /dev/null; ls /modules",
        )
        agent, release, name, root, shared, *rest = found.text.split("\n")
        assert (agent, name, root, shared) == ("init", "box", "overlay", "1777")
        assert release.endswith("-cloud-amd64")
        assert "No such file" in rest[0]
        # What container engines run containers in.
        assert (
            await run(link, "mkdir /sys/fs/cgroup/a && cat /sys/fs/cgroup/a/cgroup.procs && rmdir /sys/fs/cgroup/a")
        ).exit_code == 0
        memory = await run(link, "awk '/MemTotal/ {print $2}' /proc/meminfo")
        assert MEMORY_MB * 1024 * 0.6 < int(memory.text) < MEMORY_MB * 1024


async def test_entropy_goes_into_the_kernels_pool_and_is_used_at_once(vm: BootedVm) -> None:
    """Clones may differ without it, by the moments at which they are interrupted: that they must is what this says."""
    traced = "strace -f -p 1 -e trace=ioctl -o /root/trace > /root/attached 2>&1 & until grep -q attached /root/attached; do sleep 0.2; done"
    async with vm.link() as link:
        assert (await run(link, f"rm -f /root/trace /root/attached; {traced}")).exit_code == 0
        await request(link, "configure", user="user", entropy_b64=base64.b64encode(bytes(range(32))).decode())
        told = (
            await run(link, "pkill strace; while pgrep strace > /dev/null; do sleep 0.2; done; cat /root/trace")
        ).text
        added, reseeded = told.index("RNDADDENTROPY, {entropy_count=256, buf_size=32"), told.index("RNDRESEEDCRNG")
        assert added < reseeded, told


async def test_what_belongs_to_the_agent_is_not_for_users(vm: BootedVm) -> None:
    async with vm.link() as link:
        await request(link, "configure", user="user", sudo=True)
        found = await run(link, "sudo id -u; ls /.innkeeper/layers; cat /dev/vdb", user="user")
        assert found.text.startswith("0\n")
        assert found.text.count("Permission denied") == 2
        # Not even by root: a program of the guest's in its place would be every later command's.
        assert (await run(link, "echo x > /.innkeeper/bin/inn-agent || rm /.innkeeper/bin/inn-agent")).exit_code != 0
        assert (await run(link, "touch /.innkeeper/x")).exit_code != 0


async def test_the_host_says_what_the_network_is(vm: BootedVm) -> None:
    network = {"interface": "eth0", "mac": MAC, "address": "100.64.0.14", "prefix": 30, "gateway": "100.64.0.13"}
    async with vm.link() as link:
        await request(link, "configure", user="user", network=network)
        found = await run(
            link, "cat /sys/class/net/eth0/address; cat /proc/net/route; cat /proc/net/if_inet6; ping -c 1 127.0.0.1"
        )
        assert found.text.startswith(MAC)
        assert "eth0\t00000000\t0D004064\t0003" in found.text
        assert " eth0\n" not in found.text
        assert " 0% packet loss" in found.text
        with pytest.raises(FileMissingError):
            await request(link, "configure", network={**network, "interface": "eth7"})


async def changes_of(link: Link, name: str, folder: Path) -> tuple[dict[str, Any], list[tuple[str, bytes, int]]]:
    """The agent's answer, and the rows as the host reads them."""
    stream = link.open("changes", {"op": "changes", "id": name, "excluded": ["/run"]})
    content = b""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (event := await stream.next_event()) is not None:
            assert isinstance(event, Data)
            content += event.data
        answer = await stream.result()
    if not content:
        return answer, []
    path = folder / name
    path.write_bytes(content)
    return answer, [(row.status, row.path, row.size) for row in read_changes(path, 0, 1000)[0]]


async def test_the_kernel_loads_what_is_wanted_of_it(vm: BootedVm) -> None:
    async with vm.link() as link:
        loaded = await run(link, "cut -d' ' -f1 /proc/modules")
        assert not {"bridge", "veth", "fuse", "loop", "nfnetlink"} & set(loaded.text.split())
        # Each by the kernel's own wish: the type of an interface, two devices, the protocol of a socket.
        wishes = (
            "ip link add br0 type bridge && ip link add v0 type veth peer name v1 && ip link set v0 master br0"
            " && ip link delete v0 && ip link delete br0",
            'python3 -c \'import os; os.open("/dev/fuse", os.O_RDWR); os.open("/dev/loop-control", os.O_RDWR)\'',
            "python3 -c 'import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)'",
        )
        for line in wishes:
            done = await run(link, line)
            assert (done.exit_code, done.text) == (0, ""), line
        loaded = await run(link, "cut -d' ' -f1 /proc/modules")
        assert {"bridge", "veth", "fuse", "loop", "nfnetlink"} <= set(loaded.text.split())
        assert (await run(link, "/.innkeeper/bin/modprobe -q -- no-such-module")).exit_code == 1
        # What a guest is made of stays as it is, for root as well.
        assert (await run(link, "touch /.innkeeper/modules/x || rm /.innkeeper/bin/modprobe")).exit_code != 0
        assert (await run(link, "stat -c %a /dev/fuse /dev/loop-control")).text == "666\n600\n"


async def test_a_guest_scans_its_own_files(vm: BootedVm, tmp_path: Path) -> None:
    async with vm.link() as link:
        await request(link, "changes", op="forget")
        with pytest.raises(FileMissingError):
            await changes_of(link, "none", tmp_path)
        image_file = (await run(link, "find /usr/share -type f | head -n 1; rm -rf /tmp/new /etc/empty")).text.strip()
        await request(link, "changes", op="baseline")
        line = f"echo abc > /tmp/new; echo x >> /etc/passwd; mkdir /etc/empty; rm {image_file}"
        assert (await run(link, line)).exit_code == 0
        answer, rows = await changes_of(link, "first", tmp_path)
        assert sorted(row[:2] for row in rows) == [
            ("created", b"/tmp/new"),
            ("deleted", image_file.encode()),
            ("modified", b"/etc/passwd"),
        ]
        assert ("created", b"/tmp/new", 4) in rows
        assert answer["total"] == 3
        assert (await changes_of(link, "first", tmp_path))[1] == rows
        assert (await changes_of(link, "second", tmp_path))[1] == []
        # It waits for the next one, and keeps no guest from being taken for idle.
        assert (await request(link, "processes"))["user_processes"] == 0
        await run(link, "(sleep 1000 >/dev/null 2>&1 &)")
        assert (await request(link, "processes"))["user_processes"] == 1
        await run(link, "pkill sleep")


async def test_the_end_of_a_command_says_whether_the_disk_was_written_to(vm: BootedVm, tmp_path: Path) -> None:
    async with vm.link() as link:
        await request(link, "changes", op="baseline")

        async def nothing_written(number: int) -> bool:
            """Whether reading, and writing elsewhere, is told as nothing since a scan. What was written before may still be on its way to the disk."""
            answer, _ = await changes_of(link, f"quiet-{number}", tmp_path)
            ended = await run(link, "cat /etc/passwd; ls -R /usr/lib; python3 -c pass; echo x > /dev/shm/x")
            return ended.writes is not None and ended.writes == answer["writes"]

        deadline = time.monotonic() + PATIENCE_SECONDS
        number = 0
        while not await nothing_written(number):
            assert time.monotonic() < deadline
            number += 1
        for line in ("echo x > /tmp/written", "chmod 600 /tmp/written", "touch /tmp/written", "rm /tmp/written"):
            answer, _ = await changes_of(link, f"before-{line.split()[0]}", tmp_path)
            ended = await run(link, line)
            assert ended.writes is not None and ended.writes > answer["writes"], line
        # Asked again by the same name, the agent says nothing of now.
        await run(link, "echo x > /tmp/again")
        assert "writes" in (await changes_of(link, "again", tmp_path))[0]
        assert "writes" not in (await changes_of(link, "again", tmp_path))[0]


async def test_a_command_outlives_the_link_and_is_found_again(vm: BootedVm) -> None:
    name = os.urandom(8).hex()
    async with vm.link() as link:
        stream = link.open(
            "exec",
            {
                "id": name,
                "shell": "echo before; read line; echo $line",
                "user": "root",
                "stdin": True,
                "merge": True,
            },
        )
        assert isinstance(await stream.next_event(), Message)
        assert await stream.next_event() == Data(b"before\n")
    async with vm.connection() as (end, _):
        # The host dies in the middle of a frame.
        await asyncio.get_running_loop().sock_sendall(
            end, json_frame(Kind.HELLO, 0, {"protocol": 1}) + b"\0\3\0\0\0\0\0\1\2half"
        )
    async with vm.link() as link:
        stream = link.open("attach", {"id": name, "offset": 7})
        await stream.send_data(b"after\n")
        seen = b""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (event := await stream.next_event()) is not None:
                seen += event.data if isinstance(event, Data) else b""
        assert seen == b"after\n"


async def test_files_go_both_ways_whole(vm: BootedVm) -> None:
    content = bytes(range(256)) * 32_768
    async with vm.link() as link, asyncio.timeout(PATIENCE_SECONDS):
        stream = link.open("write", {"path": "/root/file", "user": "root"})
        for at in range(0, len(content), 262_144):
            await stream.send_data(content[at : at + 262_144])
        await stream.send_end()
        assert (await stream.result())["bytes"] == len(content)
        stream = link.open("read", {"path": "/root/file", "user": "root"})
        back = b"".join([event.data async for event in stream.events() if isinstance(event, Data)])
        assert back == content


@pytest.mark.long
async def test_a_guest_boots_on_whatever_the_one_before_left_on_its_disk(tmp_path: Path) -> None:
    disk = new_disk(tmp_path / "disk.ext4")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    with booted_vm(first, disk=disk) as vm:
        async with vm.link() as link:
            # In the place of what the boot makes, past the overlay.
            line = "echo kept > /root/kept && cd /.innkeeper/layers/disk/u && rm -rf run .innkeeper && ln -s /etc run && ln -s /init .innkeeper"
            assert (await run(link, line)).exit_code == 0
            await shut_down(link)
        assert vm.wait() == 0
    with booted_vm(second, disk=disk) as vm:
        async with vm.link() as link:
            # /run begins anew, with the folders that the image has there.
            fresh = await run(
                link,
                "cat /root/kept; cd /run && find . | sort; cd /.innkeeper/layers/image/run && find . -type d | sort",
            )
            kept, *folders = fresh.text.split()
            assert (kept, folders[: len(folders) // 2]) == ("kept", folders[len(folders) // 2 :])


async def test_a_guest_that_cannot_boot_says_why(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with booted_vm(tmp_path, disk=disk) as vm:
        async with vm.connection() as (end, first):
            link = Link(opens_odd=True)
            link.data_received(first)
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=end.dup())
            async with asyncio.timeout(PATIENCE_SECONDS):
                hello = await link.hello
            assert hello["boot_error"]["step"] == "disk"
            assert "/dev/vdb" in hello["boot_error"]["message"]
            link.close()
        assert vm.wait() == 0
