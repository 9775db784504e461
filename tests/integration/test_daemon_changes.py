"""Which files a command changed: every case by real commands in a real guest, scanned from the host, and in the long run also by a microVM's own agent."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from uuid import UUID

import pytest
from tests.guest_kernel import put_kernel
from tests.integration.booted_vm import NEEDS_QEMU, PATIENCE_SECONDS
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host

from innkeeper.core import host_verbs as verbs

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

HOME = "/home/user"
CREATED, MODIFIED, DELETED = "created", "modified", "deleted"
PREPARATION = """
mkdir -p old/deep && echo one > old/a && echo two > old/deep/b && echo three > old/c && ln old/c old/hard
head -c 65536 /dev/zero > mapped && echo x > swapped && echo y > replaced && mkdir dir && echo z > dir/in && ln -s old link
mkdir -p t && echo q > t/touched && echo r > t/mode && echo s > t/owner
"""
ODD = b"/home/user/odd-\xff\xfe"
MMAP = "import mmap\nf=open('mapped','r+b')\nm=mmap.mmap(f.fileno(),0)\nm[100:103]=b'new'\nm.close()"

CASES: list[tuple[str, str, Mapping[str, str]]] = [
    ("nothing", "true; ls -R / >/dev/null 2>&1; cat /etc/passwd >/dev/null", {}),
    ("nested", "mkdir -p a/b/c && echo x > a/b/c/d && mkdir empty", {"a/b/c/d": CREATED}),
    ("symlink", "ln -s /etc/passwd s && ln -s nowhere dangling", {"s": CREATED, "dangling": CREATED}),
    ("link turned", "ln -sfn t link", {"link": MODIFIED}),
    ("not UTF-8", "touch $'odd-\\xff\\xfe'", {"b64:" + base64.b64encode(ODD).decode(): CREATED}),
    ("rename over", "echo new > n && mv n replaced", {"replaced": MODIFIED}),
    ("rename", "mv old/a old/z", {"old/a": DELETED, "old/z": CREATED}),
    ("rename of a directory", "mv old/deep old/moved", {"old/deep/b": DELETED, "old/moved/b": CREATED}),
    ("file to directory", "rm swapped && mkdir swapped && echo f > swapped/f", {"swapped": DELETED, "swapped/f": CREATED}),
    ("and back", "rm -r swapped && echo back > swapped", {"swapped": CREATED, "swapped/f": DELETED}),
    ("made and deleted", "echo x > gone && rm gone && mkdir d9 && touch d9/x && rm -r d9", {}),
    ("touched", "touch t/touched", {"t/touched": MODIFIED}),
    ("mode only", "chmod 600 t/mode", {"t/mode": MODIFIED}),
    ("owner only", "sudo chown nobody t/owner", {"t/owner": MODIFIED}),
    ("mmap", f'python3 -c "{MMAP}"', {"mapped": MODIFIED}),
    ("same content again", "cat replaced > /tmp/r && cat /tmp/r > replaced && rm /tmp/r", {"replaced": MODIFIED}),
    ("hard link made", "ln t/mode t/mode2", {"t/mode2": CREATED}),
    ("hard link written", "echo more >> old/c", {"old/c": MODIFIED, "old/hard": MODIFIED}),
    ("sparse", "truncate -s 1G sparse", {"sparse": CREATED}),
    ("directory gone", "rm -r dir", {"dir/in": DELETED}),
    ("not on the disk", "touch /dev/shm/x; echo x > /dev/null; sudo touch /run/x; mkfifo p 2>/dev/null; rm -f p", {}),
    ("appended and shrunk", "echo more >> old/moved/b && : > t/touched", {"old/moved/b": MODIFIED, "t/touched": MODIFIED}),
    ("by root", "sudo sh -c 'echo x > /etc/made && echo y >> /etc/hostname-like'", {"/etc/made": CREATED, "/etc/hostname-like": CREATED}),
    ("copied up, unchanged", "sudo sh -c 'exec 3>>/etc/bash.bashrc'", {}),
    ("image file written", "sudo sh -c 'echo x >> /etc/profile'", {"/etc/profile": MODIFIED}),
    ("image file deleted", "sudo rm /etc/issue", {"/etc/issue": DELETED}),
    ("image file back", "sudo sh -c 'echo other > /etc/issue'", {"/etc/issue": CREATED}),
]  # fmt: skip


@pytest.fixture(
    scope="module",
    params=["gvisor", pytest.param("qemu", marks=[pytest.mark.long, pytest.mark.timeout(600), NEEDS_QEMU])],
)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def home_for(driver: str, home: Path) -> Path:
    """A state directory whose server can start guests of the driver."""
    if driver == "qemu":
        put_kernel(home / "host")
    return home


@pytest.fixture(scope="module")
async def host(anyio_backend: str, driver: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with running_host(home_for(driver, tmp_path_factory.mktemp("home")), driver=driver) as host:
        yield host


@pytest.fixture(scope="module")
async def room(host: Host) -> UUID:
    instance_id = await host.ensure()
    await host.ok(instance_id, PREPARATION)
    return instance_id


@pytest.mark.parametrize(("command", "expected"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
async def test_a_command_tells_what_it_changed(
    host: Host, room: UUID, command: str, expected: Mapping[str, str]
) -> None:
    answer = await host.ok(room, command)
    assert answer.changed == {
        name if name.startswith(("/", "b64:")) else f"{HOME}/{name}": status for name, status in expected.items()
    }
    # Each change is told once.
    assert (await host.ok(room, "true")).changed == {}


async def test_rows_say_size_and_type(host: Host, instance: UUID) -> None:
    await host.ok(instance, "echo x > doomed")
    answer = await host.ok(
        instance,
        "printf 12345 > a.txt; printf '{}' > b.json; printf '\\211PNG\\r\\n\\032\\n' > picture; printf '\\0\\1' > blob;"
        "ln -s a.txt s; rm doomed; truncate -s 3G hole; echo text > plain",
    )
    rows = {row.pop("path").removeprefix(f"{HOME}/"): row for row in answer.body["files_changed"]}
    assert rows == {
        "a.txt": {"status": CREATED, "size": 5, "mime_type": "text/plain"},
        "b.json": {"status": CREATED, "size": 2, "mime_type": "application/json"},
        "picture": {"status": CREATED, "size": 8, "mime_type": "image/png"},
        "blob": {"status": CREATED, "size": 2, "mime_type": "application/octet-stream"},
        "s": {"status": CREATED, "size": 5, "mime_type": "inode/symlink"},
        "doomed": {"status": DELETED, "size": 0, "mime_type": None},
        "hole": {"status": CREATED, "size": 3 << 30, "mime_type": "application/octet-stream"},
        "plain": {"status": CREATED, "size": 5, "mime_type": rows["plain"]["mime_type"]},
    }
    assert rows["plain"]["mime_type"].startswith("text/plain")


async def test_a_deleted_image_directory_is_expanded(host: Host, instance: UUID) -> None:
    listed = (await host.ok(instance, "find /etc/skel /etc/profile.d /etc/pam.d ! -type d")).text.split()
    answer = await host.ok(instance, "sudo rm -r /etc/skel /etc/profile.d && sudo mv /etc/pam.d /etc/moved")
    expected = dict.fromkeys(listed, DELETED)
    expected |= {path.replace("/etc/pam.d/", "/etc/moved/"): CREATED for path in listed if "/pam.d/" in path}
    assert answer.changed == expected
    assert len(expected) > 10


@pytest.mark.timeout(400)
@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
async def test_many_files_come_in_pages(host: Host, instance: UUID, count: int) -> None:
    answer = await host.ok(
        instance,
        "python3 -c \"import os\nfor d in range(100):\n os.makedirs(f'm/{d:02}')\n"
        f"for n in range({count}): os.close(os.open(f'm/{{n % 100:02}}/{{n:06}}', os.O_CREAT))\"",
        timeout_seconds=300,
    )
    body = answer.body
    assert (body["files_changed_total"], len(body["files_changed"]), body["files_changed_truncated"]) == (
        count,
        1000,
        True,
    )
    seen: list[str] = []
    cursor: int | None = 0
    while cursor is not None:
        page = await host.request(verbs.ReadFilesChanged(instance, answer.execution_id, cursor))
        assert page["total"] == count
        assert len(page["files_changed"]) <= 1000
        seen += [row["path"] for row in page["files_changed"]]
        cursor = page["next_cursor"]
    assert seen == sorted(f"{HOME}/m/{n % 100:02}/{n:06}" for n in range(count))
    again = await host.ok(instance, "echo x > m/00/000000; rm -r m/99")
    assert again.body["files_changed_total"] == count // 100 + 1
    assert again.changed[f"{HOME}/m/00/000000"] == MODIFIED
    assert (await host.ok(instance, "true")).changed == {}


async def test_a_change_is_told_to_the_first_command_that_ends_after_it(host: Host, instance: UUID) -> None:
    # /dev/shm is outside of what is compared.
    slow = "echo x > slow-1; touch /dev/shm/begun; until [ -e /dev/shm/go ]; do sleep 0.05; done; echo y > slow-2"
    waiting = asyncio.ensure_future(host.run(instance, slow))
    quick = "until [ -e /dev/shm/begun ]; do sleep 0.05; done; echo z > quick"
    assert (await host.ok(instance, quick)).changed == {f"{HOME}/slow-1": CREATED, f"{HOME}/quick": CREATED}
    released = await host.ok(instance, "touch /dev/shm/go")
    # The command that lets it go on may be the first to end after the file was made, too.
    assert [*released.changed.items(), *(await waiting).changed.items()] == [(f"{HOME}/slow-2", CREATED)]


async def test_a_background_change_is_told_to_the_next_command(host: Host, instance: UUID) -> None:
    assert (await host.ok(instance, "(sleep 0.5; echo x > late) >/dev/null 2>&1 &")).changed == {}

    async def written() -> bool:
        return "late" in json.dumps(await host.request(verbs.ListFiles(instance, HOME)))

    await eventually(written)
    assert (await host.ok(instance, "true")).changed == {f"{HOME}/late": CREATED}


async def test_nothing_is_told_twice_when_gvisor_writes_times_late(host: Host, instance: UUID) -> None:
    """gVisor keeps times of open files and flushes them when they are closed, or when somebody asks."""
    holding = "import time\nf=open('held','wb',buffering=0)\nf.write(b'1')\ntime.sleep(2)"
    twice: list[dict[str, str]] = []
    for number in range(6):
        assert f"{HOME}/w{number}" in (await host.ok(instance, f"head -c 100000 /dev/urandom > w{number}")).changed
        twice += [found for _ in range(2) if (found := (await host.ok(instance, "true")).changed)]
    assert twice == []
    await host.ok(instance, f'nohup python3 -c "{holding}" >/dev/null 2>&1 &')
    await host.ok(instance, "sleep 0.3")
    await host.ok(instance, "while pgrep python3 >/dev/null; do sleep 0.1; done")
    assert (await host.ok(instance, "cat held w0 >/dev/null; stat held >/dev/null")).changed == {}


async def test_a_frozen_guest_is_scanned_when_it_wakes_and_by_no_one_else(host: Host, instance: UUID) -> None:
    await host.ok(instance, "echo x > before")

    async def frozen() -> bool:
        return bool((await host.listed(instance) or {})["frozen"])

    await eventually(frozen)
    assert (await host.ok(instance, "echo y > after")).changed == {f"{HOME}/after": CREATED}


async def test_changes_survive_a_restart_of_the_daemon(driver: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = home_for(driver, tmp_path_factory.mktemp("home"))
    async with running_host(home, keep_running=True, driver=driver) as first:
        room = await first.ensure()
        asleep = await first.ensure()
        assert (await first.ok(room, "echo x > told")).changed == {f"{HOME}/told": CREATED}
        await first.ok(asleep, "echo x > told")
        execution = await first.ok(room, "touch one two; (sleep 1; touch while-away) >/dev/null 2>&1 &")
    async with running_host(home, driver=driver) as second:

        async def written() -> bool:
            return "while-away" in json.dumps(await second.request(verbs.ListFiles(room, HOME)))

        await eventually(written, seconds=PATIENCE_SECONDS)
        answer = await second.ok(room, "rm told")
        assert answer.changed == {f"{HOME}/told": DELETED, f"{HOME}/while-away": CREATED}
        assert (await second.ok(asleep, "true")).changed == {}
        assert (await second.ok(asleep, "touch new")).changed == {f"{HOME}/new": CREATED}
        page = await second.request(verbs.ReadFilesChanged(room, execution.execution_id))
        assert [row["path"] for row in page["files_changed"]] == [f"{HOME}/one", f"{HOME}/two"]
