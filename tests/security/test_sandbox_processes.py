"""What gVisor's processes hold of the host: the configuration that we give runsc, as the host's kernel sees it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from server_fixture import Api, Room, Server, all_pids, children, command_line

pytestmark = pytest.mark.gvisor_only(reason="a microVM's process: test_vm_processes.py")

NAMESPACES = ("user", "mnt", "ipc", "uts", "net")
SECRET = "a-secret-of-the-profile-7c1f"
# What the guest's own capabilities come to, in the sandbox's user namespace; none of them administers anything.
ADMINISTRATION = {"CAP_SYS_ADMIN": 21, "CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_MODULE": 16, "CAP_SYS_RAWIO": 17, "CAP_BPF": 39,
                  "CAP_SYS_RESOURCE": 24, "CAP_SYS_BOOT": 22, "CAP_MAC_ADMIN": 33, "CAP_PERFMON": 38}  # fmt: skip


@dataclass
class Sandbox:
    """The processes of one guest."""

    machine_id: str
    sentry: int
    gofer: int
    stubs: list[int]

    @property
    def all(self) -> list[int]:
        return [self.sentry, self.gofer, *self.stubs]


@pytest.fixture(scope="module")
def room(api: Api) -> Iterator[Room]:
    """A room with a secret in its profile, in which commands have run and are running."""
    made = api.room(api.make_profile(env={"SECRET": SECRET}))
    assert made.output("echo $SECRET; id -u; (sleep 1000 > /dev/null 2>&1 &)") == f"{SECRET}\n1000"
    made.put("/home/user/file", b"content")
    yield made
    made.delete()


@pytest.fixture
def sandbox(innkeeper: Server, room: Room) -> Sandbox:
    machine_id = innkeeper.machine_of(room.create()["instance_id"])
    roles = {command_line(pid).split(b"\0")[0]: pid for pid in innkeeper.sandbox_pids(machine_id)}
    sentry = roles[b"runsc-sandbox"]
    return Sandbox(machine_id, sentry, roles[b"runsc-gofer"], children(sentry))


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def namespace(pid: int | str, kind: str) -> str:
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def descriptors(pid: int) -> dict[int, str]:
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            continue
    return found


def mounts(pid: int) -> list[tuple[str, str, frozenset[str], str]]:
    """(root within the file system, mount point, options, type)."""
    rows = []
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        words = mount.split()
        rows.append((words[3], words[4], frozenset(words[5].split(",")), file_system.split()[0]))
    return rows


def mount_ids(pid: int) -> set[int]:
    return {int(line.split()[0]) for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()}


def test_every_process_is_filtered_and_in_namespaces_of_its_own(sandbox: Sandbox) -> None:
    assert sandbox.stubs, "systrap runs the guest's processes in stubs"
    for pid in sandbox.all:
        said = status(pid)
        assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2"), said["Name"]
        for kind in NAMESPACES:
            assert namespace(pid, kind) != namespace("self", kind), (said["Name"], kind)
        # Every thread: a filter and credentials belong to threads.
        for thread in Path(f"/proc/{pid}/task").iterdir():
            assert "\nSeccomp:\t2\n" in (thread / "status").read_text()
    assert namespace(sandbox.gofer, "pid") != namespace("self", "pid")
    assert namespace(sandbox.gofer, "net") not in (namespace("self", "net"), namespace(sandbox.sentry, "net"))
    # Control: the same look at a process of the host.
    assert status(os.getpid())["Seccomp"] == "0" or status(1)["Seccomp"] == "0"


def test_capabilities_count_in_the_sandbox_alone(sandbox: Sandbox) -> None:
    for pid in sandbox.all:
        held = int(status(pid)["CapEff"], 16) | int(status(pid)["CapPrm"], 16) | int(status(pid)["CapAmb"], 16)
        for name, number in ADMINISTRATION.items():
            assert not held & (1 << number), (pid, name)
        assert namespace(pid, "user") != namespace("self", "user")
        assert status(pid)["Groups"] == ""


def test_the_sentry_sees_an_empty_directory(sandbox: Sandbox) -> None:
    assert [(point, kind) for _, point, _, kind in mounts(sandbox.sentry)] == [("/", "tmpfs")]
    ((_, _, options, _),) = mounts(sandbox.sentry)
    assert "ro" in options
    found = [
        str(path.relative_to(f"/proc/{sandbox.sentry}/root"))
        for path in Path(f"/proc/{sandbox.sentry}/root").rglob("*")
    ]
    assert sorted(found) == ["etc", "etc/localtime", "proc"]


def test_the_gofer_sees_the_guests_root_and_three_read_only_directories(sandbox: Sandbox) -> None:
    seen = {point: (root, options, kind) for root, point, options, kind in mounts(sandbox.gofer)}
    own = {"/.innkeeper/bin", "/.innkeeper/link", "/.innkeeper/volumes"}
    assert set(seen) == {"/", *own}
    assert seen["/"][2] == "overlay" and {"nosuid", "nodev"} <= seen["/"][1]
    for point in own:
        root, options, _ = seen[point]
        assert {"ro", "nosuid", "nodev"} <= options, (
            f"{point} can be written by whoever takes the gofer or the sentry over: {sorted(options)}"
        )
        its_own = (f"/machines/{sandbox.machine_id}/link", f"/{sandbox.machine_id}")
        assert "/agent/" in root or root.endswith(its_own)


def test_no_descriptor_of_the_server_is_inherited(innkeeper: Server, sandbox: Sandbox) -> None:
    assert innkeeper.process is not None
    server = [innkeeper.process.pid, innkeeper.api_pid()]
    ours = {target for pid in server for target in descriptors(pid).values() if target.startswith(("socket:", "pipe:"))}
    assert ours, "the server has sockets"
    known = {mount for pid in (sandbox.sentry, sandbox.gofer) for mount in mount_ids(pid)}
    for pid in sandbox.all:
        for number, target in descriptors(pid).items():
            assert target not in ours, (pid, target)
            if target.startswith(("socket:", "pipe:", "anon_inode:", "/memfd:", "/dmabuf:")):
                continue
            information = dict(
                line.split(":\t")
                for line in Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines()
                if ":\t" in line
            )
            if int(information["mnt_id"]) in known:
                continue
            # What else there is: null devices, the specification, and the sandbox's own empty root while it was made.
            writes = int(information["flags"], 8) & os.O_ACCMODE
            assert target in ("/null", "/dev/null", "/") or (target.endswith("/bundle/config.json") and not writes), (
                pid,
                number,
                target,
            )
            if target == "/":
                assert not Path(f"/proc/{pid}/fd/{number}/usr").exists()


def test_environment_and_command_lines_are_clean(innkeeper: Server, sandbox: Sandbox) -> None:
    secrets = [SECRET.encode(), innkeeper.token.encode(), b"INNKEEPER"]
    assert innkeeper.process is not None
    for pid in (sandbox.sentry, sandbox.gofer):
        environment = Path(f"/proc/{pid}/environ").read_bytes().strip(b"\0").split(b"\0")
        names = {entry.partition(b"=")[0] for entry in environment if entry}
        assert names <= {b"PATH", b"LANG", b"PWD"}, names
        assert b"PWD=/work" not in environment and all(
            not entry.startswith(b"PWD=/") or entry == b"PWD=/" for entry in environment
        )
    for pid in all_pids():
        for secret in secrets[:2]:
            assert secret not in command_line(pid)
    bundle = innkeeper.home / "host" / "machines" / sandbox.machine_id / "bundle" / "config.json"
    assert SECRET not in bundle.read_text()
    # Control: what a user of the guest is given is there for it.
    for stub in sandbox.all:
        assert SECRET.encode() not in Path(f"/proc/{stub}/environ").read_bytes()
