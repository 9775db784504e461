"""What a microVM's process holds of the host under a real server: the jail that the server makes for QEMU, as the host's kernel sees it."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from server_fixture import Api, Room, Server, all_pids, command_line
from tests.guest_drivers import VM_USER

pytestmark = pytest.mark.microvms_only

NAMESPACES = ("mnt", "ipc", "uts", "pid", "net")
SECRET = "a-secret-of-the-profile-90d2"


@dataclass
class Vm:
    """The process of one guest."""

    machine_id: str
    pid: int

    def threads(self) -> list[dict[str, str]]:
        """What the kernel says of each: a filter and credentials belong to threads. One that ends meanwhile is none."""
        found = []
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                lines = (thread / "status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.append({name: value.strip() for name, _, value in (line.partition(":") for line in lines)})
        return found


@pytest.fixture(scope="module")
def room(api: Api) -> Iterator[Room]:
    """A room with a secret in its profile, in which a command has run and one is running."""
    made = api.room(api.make_profile(env={"SECRET": SECRET}))
    assert made.output("echo $SECRET; id -u; (sleep 1000 > /dev/null 2>&1 &)") == f"{SECRET}\n1000"
    yield made
    made.delete()


@pytest.fixture
def vm(innkeeper: Server, room: Room) -> Vm:
    machine_id = innkeeper.machine_of(room.create()["instance_id"])
    (pid,) = innkeeper.sandbox_pids(machine_id)
    return Vm(machine_id, pid)


def descriptors(pid: int) -> dict[int, str]:
    """The targets of a process's descriptors; one that is closed meanwhile is none."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            continue
    return found


def test_every_thread_is_a_user_without_rights_and_filtered(innkeeper: Server, vm: Vm) -> None:
    user = pwd.getpwnam(VM_USER)
    api = Path(f"/proc/{innkeeper.api_pid()}").stat().st_uid
    assert user.pw_uid not in (0, api) and user.pw_gid != 0
    threads = vm.threads()
    assert threads
    for said in threads:
        assert said["Uid"].split() == [str(user.pw_uid)] * 4, said["Name"]
        assert said["Gid"].split() == [str(user.pw_gid)] * 4, said["Name"]
        assert said["Groups"] == "", said["Name"]
        for capabilities in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
            assert int(said[capabilities], 16) == 0, (said["Name"], capabilities)
        assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2"), said["Name"]


def test_its_namespaces_are_its_own_and_its_root_is_read_only(vm: Vm) -> None:
    assert vm.threads()[0]["NSpid"].split()[1:] == ["1"], "it is the first process of its namespace, and sees no other"
    for kind in NAMESPACES:
        assert Path(f"/proc/{vm.pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink(), kind
    rows = [line.split() for line in Path(f"/proc/{vm.pid}/mountinfo").read_text().splitlines()]
    options = {row[4]: set(row[5].split(",")) for row in rows}
    assert "/old" not in options
    for point, found in options.items():
        assert "nosuid" in found, (point, found)
        if point not in ("/dev/null", "/dev/urandom"):
            assert "ro" in found, (point, found)
        if point.startswith(("/kernel", "/initramfs", "/proc", "/usr", "/etc")):
            assert "nodev" in found, (point, found)
    seen = Path(f"/proc/{vm.pid}/root")
    assert sorted(os.listdir(seen / "proc")) == ["1", "self", "thread-self"]  # noqa: PTH208
    for hidden in ("home", "root", "var", "run", "tmp", "sys", "work", "etc/passwd", "dev/kvm", "dev/mem"):
        assert not (seen / hidden).exists(), hidden


def test_of_the_hosts_files_it_has_its_disk_and_reads_its_image(innkeeper: Server, vm: Vm) -> None:
    assert innkeeper.process is not None
    server = [innkeeper.process.pid, innkeeper.api_pid()]
    ours = {target for pid in server for target in descriptors(pid).values() if target.startswith(("socket:", "pipe:"))}
    assert ours, "the server has sockets"
    written, read = set(), set()
    for number, target in descriptors(vm.pid).items():
        assert target not in ours, (number, target)
        if target.startswith(("socket:", "pipe:", "anon_inode:", "/memfd:")):
            continue
        try:
            information = Path(f"/proc/{vm.pid}/fdinfo/{number}").read_text()
        except FileNotFoundError:
            continue
        flags = next(line.split()[1] for line in information.splitlines() if line.startswith("flags:"))
        (written if int(flags, 8) & os.O_ACCMODE else read).add(target)
    written -= {"/dev/null", "/dev/net/tun"}
    assert len(written) == 1 and "/disks/" in min(written), written
    read -= {"/dev/null", "/dev/urandom"}
    assert len(read) == 1 and "/images/" in min(read), read


def test_nothing_that_it_was_started_with_is_a_secret(innkeeper: Server, vm: Vm) -> None:
    environment = Path(f"/proc/{vm.pid}/environ").read_bytes().strip(b"\0").split(b"\0")
    assert {entry.partition(b"=")[0] for entry in environment if entry} <= {b"PATH", b"LANG", b"PWD"}
    secrets = (SECRET.encode(), innkeeper.token.encode())
    for pid in all_pids():
        assert not any(secret in command_line(pid) for secret in secrets), pid
    plan = (innkeeper.home / "host" / "machines" / vm.machine_id / "jail.json").read_bytes()
    assert b'"uid"' in plan and not any(secret in plan for secret in secrets)


def test_another_guest_of_the_user_is_out_of_its_reach(api: Api, base: str, innkeeper: Server, vm: Vm) -> None:
    """All of them are one user's: what keeps them apart are the namespaces."""
    other = api.room(base)
    try:
        (pid,) = innkeeper.sandbox_pids(innkeeper.machine_of(other.create()["instance_id"]))
        for kind in NAMESPACES:
            assert Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/{vm.pid}/ns/{kind}").readlink(), kind
        mine, others = (
            {target for target in descriptors(one).values() if "/disks/" in target or target.startswith("socket:")}
            for one in (vm.pid, pid)
        )
        assert mine and others and not mine & others
    finally:
        other.delete()
