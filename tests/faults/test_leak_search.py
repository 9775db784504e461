"""`inn doctor --leaks` and the gauge find each kind of thing that a server can leave, name its owner, and find nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from server_fixture import CONTROL_GROUPS, Server, server, until
from tests.faults import census

from innkeeper.core.leak import LeakKind
from innkeeper.host.linux import loop_device, mounts

GHOST = "00000000deadbeef"


@pytest.fixture(scope="module")
def leaky() -> Iterator[Server]:
    with server("base", INNKEEPER_KEEP_MACHINES="true") as running:
        yield running
        if running.process is None:
            running.start()
        running.stop()
        running.start(INNKEEPER_KEEP_MACHINES="false")


def found(running: Server) -> dict[tuple[str, str], str]:
    """{(kind, owner): name} of `inn doctor --leaks`, whose status says whether there are any."""
    done = running.inn("doctor", "--leaks", "--json")
    leaks = json.loads(done.stdout)
    assert done.returncode == bool(leaks), done.stderr
    return {(leak["kind"], leak["owner"]): leak["name"] for leak in leaks}


@contextmanager
def planted(running: Server) -> Iterator[set[tuple[str, str]]]:
    """One leak of each kind; what is to be found of them."""
    host, identifier = running.home / "host", running.server_id
    with ExitStack() as stack:

        def file(path: Path) -> None:
            path.touch()
            stack.callback(path.unlink, missing_ok=True)

        def folder(path: Path) -> None:
            path.mkdir(parents=True)
            stack.callback(lambda: path.is_dir() and path.rmdir())

        argv = ["sh", "-c", "read line", f"--root={host}/runsc", f"--bundle={host}/machines/{GHOST}/bundle"]
        stray = stack.enter_context(subprocess.Popen(argv, stdin=subprocess.PIPE))
        stack.callback(stray.kill)
        folder(CONTROL_GROUPS / "freezer" / f"innkeeper-{identifier}" / GHOST)
        file(host / "runsc" / f"runsc-{GHOST}.sock")
        folder(host / "machines" / GHOST)
        folder(host / "mounts" / "machines" / GHOST / "disk")
        mounts.mount("none", host / "mounts" / "machines" / GHOST / "disk", "tmpfs")
        stack.callback(lambda: asyncio.run(mounts.umount_tree(host / "mounts" / "machines" / GHOST)))
        file(host / "pool" / "disks" / f"{GHOST}.img")
        other = host / "pool" / "disks" / "loose.img"
        other.write_bytes(bytes(1 << 20))
        stack.callback(other.unlink, missing_ok=True)
        with loop_device.attach(other, autoclear=False) as device:
            stack.callback(loop_device.detach, device.path)
        file(host / "pool" / "templates" / ".template-1234")
        namespace, router = f"ik{identifier}-s900", f"ik{identifier}-router"
        subprocess.run(["ip", "netns", "add", namespace], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "delete", namespace], stderr=subprocess.DEVNULL)
        enter = ["nsenter", f"--net=/run/netns/{router}", "nft"]
        element = ["element", "ip", "innkeeper", "online", '{ "s901" }']
        if Path("/run/netns", router).exists():
            subprocess.run([*enter, "add", *element], check=True)
            stack.callback(subprocess.run, [*enter, "delete", *element], stderr=subprocess.DEVNULL)
        machine = f"machine {GHOST}"
        yield {
            ("process", machine),
            ("control_group", machine),
            ("runtime_file", machine),
            ("folder", machine),
            ("mount", machine),
            ("disk", f"disk {GHOST}"),
            ("disk", "disk loose"),
            ("loop_device", "disk loose"),
            ("temporary_file", "server"),
            ("network_namespace", "slot 900"),
            ("firewall_element", "slot 901"),
        }


def gauge(running: Server) -> dict[str, float]:
    page = running.client().get("/metrics").text
    return {kind: float(n) for kind, n in re.findall(r'^innkeeper_leaked_resources{.*kind="(\w+)"} (\S+)$', page, re.M)}


def test_a_running_server_knows_its_leaks(leaky: Server) -> None:
    api = leaky.api()
    room = api.room(api.make_profile(warm_pool_size=1))
    room.output("true")
    until(lambda: found(leaky) == {})
    assert gauge(leaky) == {kind.value: 0 for kind in LeakKind}
    assert census.wait_for_none(leaky.home) == []
    with planted(leaky) as leaks:
        assert found(leaky).keys() == leaks
        assert gauge(leaky) == {kind.value: sum(one == kind for one, _ in leaks) for kind in LeakKind}
        said = leaky.inn("doctor", "--leaks")
        assert said.returncode == 1
        assert f"mount  machine {GHOST}  {leaky.home}/host/mounts/machines/{GHOST}/disk" in said.stdout
    until(lambda: found(leaky) == {})
    assert room.delete().status_code == 204


def test_one_that_does_not_run_has_them_found_and_the_next_start_removes_them(leaky: Server) -> None:
    api = leaky.api()
    room = api.room(api.make_profile())
    room.output("echo kept > file")
    assert leaky.stop() == 0
    # Its guests wait for the next one: they are no leaks.
    assert census.runsc_pids(leaky.home)
    assert found(leaky) == {}
    with planted(leaky) as leaks:
        assert found(leaky).keys() == leaks
        leaky.start()
        until(lambda: found(leaky) == {})
        assert census.wait_for_none(leaky.home) == []
    again = type(room)(leaky.client(), room.profile_id, room.room_id)
    assert again.output("cat file") == "kept"
    assert again.delete().status_code == 204


def test_what_a_killed_server_had_ready_is_found_until_it_starts_again_and_nothing_of_others(leaky: Server) -> None:
    # A command line like runsc's proves nothing: anybody may have one.
    argv = ["sh", "-c", "read line", f"--root={leaky.home}/host/runsc"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, user="nobody", cwd="/") as other:
        leaky.kill()
        kinds = {kind for kind, _ in found(leaky)}
        assert "network_namespace" in kinds and "process" not in kinds, kinds
        leaky.start()
        until(lambda: found(leaky) == {})
        assert other.poll() is None
        os.kill(other.pid, signal.SIGKILL)
