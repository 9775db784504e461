"""MicroVMs that begin as clones of one, by translation: who they are, what they share, and what they cannot do to each other. One template for all of it."""

import asyncio
import base64
import mmap
import os
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests import leaks
from tests.contracts.drivers import LINK_SECONDS, Guest, Lab, lab, qemu
from tests.integration.booted_vm import NEEDS_QEMU, boot_files

from innkeeper.host.disks.disk_template import reflink
from innkeeper.host.drivers.contract import checkpointing, templating
from innkeeper.host.linux.subreaper import OrphanReaper, become_subreaper
from innkeeper.host.machine_builder import WARM_LINES

pytestmark = [pytest.mark.anyio, NEEDS_QEMU]
NUMBERS = "od -An -N16 -tx8 /dev/urandom; python3 -c 'import random; print(random.random())'"


@dataclass
class Clone(Guest):
    """A guest that was told the time after a moment."""

    configured_at: float


@dataclass
class Kept:
    """A template."""

    lab: Lab
    folder: Path

    async def clone(self, name: str) -> Clone:
        """A clone that has a name of its own."""
        plan, disk = await self.lab.plan(copy_of=self.folder / "disk.img")
        driver = templating(self.lab.driver)
        guest = await self.lab.come_up(plan, disk, lambda plan: driver.clone(plan, self.folder / "memory"))
        configured_at = time.time()
        await configure(guest, name)
        return Clone(**vars(guest), configured_at=configured_at)


async def configure(guest: Guest, name: str, *, warm: bool = False) -> None:
    params = {
        "hostname": name,
        "machine_id": secrets.token_hex(16),
        "time_unix_ns": time.time_ns(),
        "entropy_b64": base64.b64encode(os.urandom(64)).decode(),
        "user": "root",
        "env": {},
        "sudo": False,
        "spare_shell": not warm,
        "warm": list(WARM_LINES) if warm else [],
        "restored": not warm,
    }
    await guest.endpoint.request("configure", params, timeout_seconds=LINK_SECONDS)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def kept(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kept]:
    home = tmp_path_factory.mktemp("templates")
    become_subreaper()
    with OrphanReaper().running():
        async with lab(qemu(), home) as there:
            plan, disk = await there.plan()
            guest = await there.launch(replace(plan, as_template=True), disk)
            await configure(guest, "template", warm=True)
            folder = there.pool.directory / "kept"
            (folder / "memory").mkdir(parents=True)
            await templating(there.driver).keep(guest.id, folder / "memory")
            reflink(there.pool.disk_path(guest.id), folder / "disk.img")
            await there.driver.stop(guest.id)
            yield Kept(there, folder)
            await there.stack.pop_all().aclose()
            assert await there.driver.found() == set()
    assert leaks.wait_for_none(home) == []


@pytest.fixture(scope="module")
async def clones(kept: Kept) -> list[Clone]:
    """Three, begun at once."""
    return list(await asyncio.gather(*(kept.clone(f"clone-{number}") for number in range(3))))


async def test_no_two_clones_have_the_same_numbers_or_name_and_each_knows_the_time(
    kept: Kept, clones: list[Clone]
) -> None:
    await check_identities(kept, clones)


@pytest.mark.long
async def test_nor_have_twenty(kept: Kept) -> None:
    many = [await kept.clone(f"clone-{number}") for number in range(20)]
    await check_identities(kept, many)
    for clone in many:
        await kept.lab.driver.stop(clone.id)


async def check_identities(kept: Kept, clones: list[Clone]) -> None:
    found = []
    for clone in clones:
        exit_code, text = await clone.run(f"hostname; cat /etc/machine-id; {NUMBERS}; date +%s.%N", seconds=120)
        assert exit_code == 0, text
        *rest, clock = text.split()
        # One that had kept the template's time would be behind its own beginning.
        assert clone.configured_at < float(clock) < time.time()
        found.append(rest)
    print(f"{len(clones)} clones: {found}")
    assert [row[0] for row in found] == [f"clone-{number}" for number in range(len(clones))]
    for column in zip(*found, strict=True):
        assert len(set(column)) == len(clones), column


async def test_what_a_template_depends_on(kept: Kept) -> None:
    """New guests get the newest kernel and agent; memory that was saved goes on with those that it has."""
    driver = templating(kept.lab.driver)
    memory, needs = await checkpointing(kept.lab.driver).memory_needs(), await driver.template_needs()
    assert needs == {**memory, "kernel": boot_files().identity}
    assert memory.keys() == {"qemu", "accelerator", "options", "cpu"} and all(memory.values())


async def test_what_a_clone_writes_is_its_own(clones: list[Clone]) -> None:
    one, other, _ = clones
    written = "echo mine > /root/note; echo mine > /dev/shm/note; cat /root/note"
    assert await one.run(written, seconds=90) == (0, "mine\n")
    exit_code, _ = await other.run("cat /root/note || cat /dev/shm/note", seconds=90)
    assert exit_code != 0


async def test_no_clone_can_write_what_the_others_read(clones: list[Clone]) -> None:
    pid = _pid(clones[0])
    # As whoever has taken QEMU over, and with root's rights besides.
    names = _memories(pid)
    assert names
    for name in names:
        with name.open("r+b", buffering=0) as memory:
            with pytest.raises(PermissionError):
                memory.write(b"x")
            with pytest.raises(PermissionError):
                memory.truncate(0)
            with pytest.raises(PermissionError):
                mmap.mmap(memory.fileno(), 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    # It sees no process but itself.
    assert sorted(os.listdir(f"/proc/{pid}/root/proc")) == ["1", "self", "thread-self"]  # noqa: PTH208


async def test_clones_outlive_what_the_daemon_holds_of_their_template(kept: Kept, clones: list[Clone]) -> None:
    driver = templating(kept.lab.driver)
    assert driver.held_bytes() > 0
    driver.forget(kept.folder / "memory")
    assert driver.held_bytes() == 0
    assert [await clone.run("hostname", seconds=90) for clone in clones] == [(0, f"clone-{n}\n") for n in range(3)]


def _pid(guest: Guest) -> int:
    return int((guest.plan.state_dir / "vm.pid").read_text())


def _memories(pid: int) -> list[Path]:
    return [path for path in Path(f"/proc/{pid}/fd").iterdir() if str(path.readlink()).startswith("/memfd:")]
