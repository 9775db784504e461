"""Checkpoints of real guests by a real daemon: taken while they work, restored as others, forked, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.integration.booted_vm import NEEDS_QEMU, boot_files
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host
from tests.integration.network_world import SERVER, world

from innkeeper.bus.contract import Message
from innkeeper.core import checkpoint_verbs as verbs
from innkeeper.core.host_verbs import EnsureMachine, to_wire
from innkeeper.errors import (
    CheckpointFailedError,
    CheckpointNotFoundError,
    ConflictError,
    InstanceNotFoundError,
    InvalidRequestError,
    MemoryUnusableError,
    UnavailableError,
)
from innkeeper.host import checkpoints
from innkeeper.host.disks.checkpoint_store import Checkpoint
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.drivers import vm_memory

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

# A guest whose instructions are translated takes many times as long, on a busy machine as long as this.
VM_SECONDS = 180.0
STEPS = ["quiet", "paused", "saved", "copied", "resumed", "linked"]
COUNT = "for ((n = 0; ; n++)); do echo $n > /home/user/new; mv /home/user/new /home/user/count; sleep 0.02; done"
# From the kernel, from a fresh Python, and from the shell that lay ready.
RANDOM = "echo $RANDOM$RANDOM; od -An -tx8 -N8 /dev/urandom; python3 -c 'import random; print(random.random())'"


# Holds a connection to another machine, and tells how it ended.
CONNECTED = f"""
import socket
held = socket.create_connection(("{SERVER}", 80))
assert held.makefile("rb").readline() == b"hello\\n"
open("/home/user/connected", "w").close()
try:
    said = held.recv(1)
except OSError as error:
    said = type(error).__name__
open("/home/user/said", "w").write(str(said))
"""


@pytest.fixture(
    scope="module",
    params=[
        "systrap",
        pytest.param("ptrace", marks=pytest.mark.long),
        pytest.param("qemu", marks=[pytest.mark.long, NEEDS_QEMU]),
    ],
)
async def host(
    anyio_backend: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Host]:
    home, platform = tmp_path_factory.mktemp("home"), request.param
    if platform == "qemu":
        # Of its own: a server removes what its own guests do not boot.
        kernel = boot_files().kernel.parent
        shutil.copytree(kernel, home / "host" / "kernels" / kernel.name, ignore=shutil.ignore_patterns("initramfs-*"))
        platform = "systrap"
    async with (
        world() as there,
        running_host(home, runsc_platform=platform, host_netns=there.host, dns_upstreams=SERVER) as host,
    ):
        host.driver = "qemu" if request.param == "qemu" else "gvisor"
        yield host
        assert (await host.status())["leaked"] == 0


async def ask(host: Host, verb: Any) -> tuple[dict[str, Any], list[str]]:
    """A verb's answer, and the steps that it told on the way."""
    async with asyncio.timeout(2 * VM_SECONDS), host.bus.open(host.daemon.host_id, verb.verb, to_wire(verb)) as call:
        steps = [str(event.body["step"]) async for event in call.events() if isinstance(event, Message)]
        return await call.result(), steps


async def take(host: Host, instance: UUID) -> UUID:
    checkpoint = uuid4()
    answer, steps = await ask(host, verbs.TakeCheckpoint(instance, checkpoint))
    assert steps == STEPS
    # The link of a microVM stays: it does not answer while it stands still.
    assert 0 < answer["paused_ms"] <= answer["downtime_ms"]
    print(
        f"down {answer['downtime_ms']:.0f} ms, paused {answer['paused_ms']:.0f} ms, {answer['memory']['size_bytes']} B"
    )
    return checkpoint


def machine(host: Host, *, name: str = "clone", **shape: Any) -> EnsureMachine:
    instance = uuid4()
    host.instances.add(instance)
    return EnsureMachine(instance, host.shape(**shape), name)


async def restore(host: Host, checkpoint: UUID, *, disk_only: bool = False, **more: Any) -> UUID:
    wanted = machine(host, **more)
    answer, _ = await ask(host, verbs.RestoreCheckpoint(checkpoint, wanted, disk_only))
    assert answer["restored"] == (not disk_only)
    return wanted.instance_id


async def listed(host: Host) -> dict[str, dict[str, Any]]:
    answer, _ = await ask(host, verbs.ListCheckpoints())
    return {row["checkpoint_id"]: row for row in answer["checkpoints"]}


@pytest.fixture(autouse=True)
async def nothing_kept(host: Host) -> AsyncIterator[None]:
    yield
    for checkpoint in await listed(host):
        await host.request(verbs.DropCheckpoint(UUID(checkpoint)))


async def counted(host: Host, instance: UUID, *, above: int = -1) -> int:
    """A count that goes on."""
    first = int(await eventually(lambda: count_above(host, instance, above)))
    return int(await eventually(lambda: count_above(host, instance, first)))


async def count_above(host: Host, instance: UUID, least: int) -> str | None:
    answer = await host.run(instance, "cat count")
    return answer.text if answer.exit_code == 0 and int(answer.text) > least else None


async def test_a_restored_guest_goes_on_as_another(host: Host, instance: UUID) -> None:
    await host.ok(instance, f"({COUNT}) > /dev/null 2>&1 & echo before > file")
    before = await counted(host, instance)
    # Followed over the checkpoint, on a link that is let go of meanwhile.
    followed = asyncio.ensure_future(host.ok(instance, "for n in 1 2 3 4 5 6; do echo $n; sleep 0.3; done"))
    await asyncio.sleep(0.3)
    checkpoint = await take(host, instance)
    assert (await followed).text == "1\n2\n3\n4\n5\n6\n"
    await host.ok(instance, "echo after > file")
    clone = await restore(host, checkpoint)
    assert await counted(host, clone) >= before
    assert await counted(host, instance) > before
    assert (await host.ok(clone, "cat file; hostname; cat /etc/hostname; hostname -i")).text == (
        "before\nclone\nclone\n127.0.1.1\n"
    )
    assert (await host.ok(instance, "cat file; hostname")).text == "after\nguest\n"
    identity = "cat /etc/machine-id; ip -4 -o addr show dev eth0 | tr -s ' ' | cut -d' ' -f4"
    ours, theirs = [(await host.ok(one, identity)).text.split() for one in (instance, clone)]
    assert len(set(ours + theirs)) == 4
    # What the copy brought is no change of its first command's.
    changed = (await host.ok(clone, "echo new > mine")).changed
    assert "/home/user/mine" in changed and "/home/user/file" not in changed and "/etc/hostname" not in changed
    await host.destroy(clone)


@pytest.mark.long
async def test_connections_to_others_break_and_new_ones_work(host: Host) -> None:
    instance = await host.ensure(shape=host.shape(egress_mode="internet"))
    await host.write(instance, "/home/user/program.py", CONNECTED.encode())
    await host.ok(instance, "(python3 program.py > /dev/null 2>&1 &)")
    await eventually(lambda: exists(host, instance, "connected"))
    clone = await restore(host, await take(host, instance), egress_mode="internet")
    for one in (instance, clone):
        if host.driver == "gvisor":
            await eventually(lambda one=one: exists(host, one, "said"))
            assert "Error" in (await host.ok(one, "cat said")).text
        else:
            # The one that was saved keeps it, and where it was restored nobody answers any more: its address is another's.
            assert not await exists(host, one, "said")
        answer = await host.ok(one, f"python3 -c 'import socket; socket.create_connection((\"{SERVER}\", 80), 20)'")
        assert answer.exit_code == 0
        await host.destroy(one)


async def exists(host: Host, instance: UUID, name: str) -> bool:
    return (await host.run(instance, f"test -e {name}")).exit_code == 0


@pytest.mark.parametrize("clones", [2, pytest.param(20, marks=pytest.mark.long)])
async def test_clones_share_no_random_numbers_and_know_the_time(host: Host, instance: UUID, clones: int) -> None:
    await host.ok(instance, "true")
    checkpoint = await take(host, instance)
    seen: list[str] = []
    for _ in range(clones):
        clone = await restore(host, checkpoint)
        before = time.time()
        now = float((await host.ok(clone, "date +%s.%N")).text)
        assert before - 1 <= now <= time.time() + 1
        seen += (await host.ok(clone, RANDOM)).text.split()
        await host.destroy(clone)
    assert len(seen) == 3 * clones and len(set(seen)) == len(seen)


async def test_a_fork_keeps_nothing_and_both_go_on(host: Host, instance: UUID) -> None:
    await host.ok(instance, f"({COUNT}) > /dev/null 2>&1 &")
    before = await counted(host, instance)
    wanted = machine(host, name="fork")
    answer, steps = await ask(host, verbs.ForkMachine(instance, wanted))
    assert answer["restored"] and answer["downtime_ms"] > 0
    assert steps[: len(STEPS)] == STEPS and steps[-1] == "ready"
    fork = wanted.instance_id
    assert await counted(host, fork) >= before
    await host.ok(instance, "echo ours > file")
    assert (await host.run(fork, "cat file")).exit_code != 0
    assert await listed(host) == {}
    for other in (instance, fork):
        with pytest.raises(ConflictError):
            await ask(host, verbs.ForkMachine(instance, EnsureMachine(other, host.shape(), "again")))
    # It has a disk of its own, on which it starts again.
    await host.ok(fork, "echo theirs > file; sync")
    await host.destroy(fork, keep_disk=True)
    await host.ensure(fork)
    assert (await host.ok(fork, "cat file; hostname")).text == "theirs\nfork\n"
    await host.destroy(fork)


async def test_the_disk_alone_of_a_running_and_of_a_stopped_guest(host: Host, instance: UUID) -> None:
    await host.ok(instance, "echo running > file; head -c 50000000 /dev/urandom > large")
    running, stopped = uuid4(), uuid4()
    answer, _ = await ask(host, verbs.SnapshotDisk(instance, running))
    assert answer["memory"] is None and answer["downtime_ms"] > 0
    print(f"disk alone: {answer['downtime_ms']} ms")
    await host.ok(instance, "echo stopped > file; sync")
    await host.destroy(instance, keep_disk=True)
    answer, _ = await ask(host, verbs.SnapshotDisk(instance, stopped))
    assert answer["downtime_ms"] == 0 and answer["disk_bytes"] > 50_000_000
    for checkpoint, content in ((running, "running"), (stopped, "stopped")):
        with pytest.raises(MemoryUnusableError, match="only a disk"):
            await restore(host, checkpoint)
        clone = await restore(host, checkpoint, disk_only=True, memory_mb=256)
        assert (await host.ok(clone, "cat file; hostname")).text == f"{content}\nclone\n"
        await host.destroy(clone)
    with pytest.raises(ConflictError):
        await ask(host, verbs.SnapshotDisk(uuid4(), stopped))
    with pytest.raises(InstanceNotFoundError):
        await ask(host, verbs.SnapshotDisk(uuid4(), uuid4()))
    with pytest.raises(InstanceNotFoundError):
        await ask(host, verbs.TakeCheckpoint(instance, uuid4()))


async def test_a_checkpoint_is_named_listed_and_dropped(host: Host, instance: UUID) -> None:
    checkpoint = await take(host, instance)
    again, _ = await ask(host, verbs.TakeCheckpoint(instance, checkpoint))
    row = (await listed(host))[str(checkpoint)]
    assert again == row
    assert row["memory"]["memory_mb"] == 512 and row["disk_mb"] == 2048 and row["instance_id"] == str(instance)
    for change, named in (
        ({"memory_mb": 256}, "memory_mb"),
        ({"disk_mb": 4096}, "disk_mb"),
        ({"vcpu_count": 2}, "vcpu"),
    ):
        with pytest.raises(InvalidRequestError, match=named):
            await restore(host, checkpoint, **change)
    with pytest.raises(InvalidRequestError, match="image"):
        await restore(host, checkpoint, image_digest="a" * 64)
    # The image below it is in use for as long as it is there, and its agent.
    assert host.image.digest in (host.daemon.fleet.images_in_use() or ())
    for _ in range(2):
        await host.request(verbs.DropCheckpoint(checkpoint))
    assert await listed(host) == {}
    with pytest.raises(CheckpointNotFoundError):
        await restore(host, checkpoint)


async def test_whoever_drops_one_does_not_wait_for_its_checksum(
    host: Host, instance: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = uuid4()
    await host.request(verbs.SnapshotDisk(instance, kept))
    begun, go_on, digest = threading.Event(), threading.Event(), Checkpoint.disk_digest

    def slowly(checkpoint: Checkpoint) -> str:
        begun.set()
        go_on.wait(60)
        return digest(checkpoint)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "disk_digest", slowly)
        asking = asyncio.ensure_future(host.request(verbs.DigestCheckpoint(kept)))
        try:
            await eventually(begun.is_set)
            await host.request(verbs.DropCheckpoint(kept))
        finally:
            go_on.set()
        with pytest.raises(CheckpointNotFoundError):
            await asking


async def test_memory_that_does_not_fit_is_refused_and_the_disk_is_not(host: Host, instance: UUID) -> None:
    await host.ok(instance, "echo kept > file")
    checkpoint = await take(host, instance)
    folder = host.settings.host_dir / "pool" / "checkpoints" / str(checkpoint)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    for name in json.loads(text)["memory"]["needs"]:
        body = json.loads(text)
        body["memory"]["needs"][name] = "other"
        manifest.write_text(json.dumps(body))
        with pytest.raises(MemoryUnusableError, match=f"another {name} "):
            await restore(host, checkpoint)
    for name, value in (("driver", "other"), ("agent", "0123456789abcdef")):
        body = json.loads(text)
        body["memory"][name] = value
        manifest.write_text(json.dumps(body))
        with pytest.raises(MemoryUnusableError, match=name):
            await restore(host, checkpoint)
    manifest.write_text(text)
    pages = max((folder / "memory").iterdir(), key=lambda path: path.stat().st_size)
    with pages.open("r+b") as file:
        file.seek(pages.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(MemoryUnusableError, match="damaged"):
        await restore(host, checkpoint)
    clone = await restore(host, checkpoint, disk_only=True)
    assert (await host.ok(clone, "cat file")).text == "kept\n"
    await host.destroy(clone)


async def test_what_cannot_be_taken_leaves_the_guest_as_it_was(
    host: Host, instance: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.ok(instance, f"({COUNT}) > /dev/null 2>&1 &")
    await host.ok(instance, "exec 7>gone; rm gone; (sleep 1000 >&7 2>/dev/null &)")
    if host.driver == "gvisor":
        with pytest.raises(CheckpointFailedError, match="deleted: /home/user/gone"):
            await take(host, instance)
    else:
        with monkeypatch.context() as patched:
            patched.setattr(vm_memory, "SAVE_SECONDS", 0.0)
            with pytest.raises(CheckpointFailedError, match="in time"):
                await take(host, instance)
    await host.ok(instance, "pkill sleep")
    with monkeypatch.context() as patched:
        patched.setattr(DiskPool, "free_bytes", lambda _: 3 << 20)
        with pytest.raises(UnavailableError, match="disk is full"):
            await take(host, instance)
    monkeypatch.setattr(checkpoints, "TRANSFER_SECONDS", 0.5)
    async with host.daemon.fleet.machine(instance).transferring():
        if host.driver == "gvisor":
            with pytest.raises(ConflictError, match="transferred"):
                await take(host, instance)
    await counted(host, instance)
    checkpoint = await take(host, instance)
    await counted(host, instance)
    assert list(await listed(host)) == [str(checkpoint)]


@pytest.mark.long
async def test_a_frozen_guest_is_thawed_for_it(host: Host, instance: UUID) -> None:
    found = host.daemon.fleet.machine(instance)
    await eventually(lambda: found.frozen)
    checkpoint = await take(host, instance)
    await eventually(lambda: found.frozen)
    clone = await restore(host, checkpoint)
    await eventually(lambda: host.daemon.fleet.machine(clone).frozen)
    assert (await host.ok(clone, "hostname")).text == "clone\n"
    await host.destroy(clone)
