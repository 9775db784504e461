"""Attacks on the guest's agent and its link, from inside: by the user, who must get nothing, and by root, who must get nothing beyond the guest."""

from __future__ import annotations

import json
import threading
import time

import pytest
from guest_side import PROGRAMS, run_program
from server_fixture import Api, Room, Server
from tests.guest_drivers import GVISOR, QEMU

pytestmark = pytest.mark.microvms

# gVisor shows these of every process to everybody in its guest; the agent's environment holds nothing (see below).
SHOWN = {"read environ", "read auxv", "read maps", "list descriptors"}
# Root in a guest owns the agent: it may read and change it. That is a hostile agent, and its own guest's end.
OF_ROOT = ("read ", "list descriptors", "open descriptor", "write memory", "steal a descriptor", "dial")
LISTS = {
    GVISOR: {
        "list /.innkeeper/link": "agent.sock generation",
        "list /.innkeeper/link/..": "bin link volumes",
        "list /.innkeeper/bin/..": "bin link volumes",
    },
    QEMU: {
        "list /.innkeeper/link": "",
        "list /.innkeeper/link/..": "",
        "list /.innkeeper/bin/..": "bin layers modules",
    },
}


def test_the_user_gets_nothing_of_the_agent(attacker: Room, driver: str) -> None:
    said = json.loads(run_program(attacker, "agent_attack"))
    assert len(said) > 20
    assert {name for name, what in said.items() if what.startswith("done")} <= SHOWN, said
    assert {name: said[name] for name in LISTS[driver]} == LISTS[driver]
    assert attacker.output("echo alive") == "alive"


def test_root_gets_nothing_beyond_the_guest(attacker: Room, neighbour: Room, innkeeper: Server, driver: str) -> None:
    said = json.loads(run_program(attacker, "agent_attack", root=True))
    done = {name: what for name, what in said.items() if what.startswith("done")}
    assert {name: what for name, what in done.items() if not name.startswith(OF_ROOT)} == {}, done
    # A second link is hung up on before a word, and a port has one holder, so nobody can stand beside the agent.
    if driver == GVISOR:
        assert said["dial"] == "done: b''", said["dial"]
    else:
        ports = {what for name, what in said.items() if name.startswith("open the port")}
        assert ports == {"Device or resource busy"}, said
    assert {name: said[name] for name in LISTS[driver]} == LISTS[driver]
    host = innkeeper.home / "host"
    machine = innkeeper.machine_of(attacker.create()["instance_id"])
    link = host / "machines" / machine / "link"
    if driver == GVISOR:
        assert {path.name for path in link.iterdir()} == {"agent.sock", "generation"}
        assert len((link / "generation").read_bytes()) < 100
    else:
        assert {path.name for path in link.iterdir()} == {"agent.sock"}
    agents = list((host / "agent").glob("*/inn-agent"))
    assert agents and all(agent.stat().st_size > 1_000_000 for agent in agents)
    assert attacker.output("echo alive") == neighbour.output("echo alive") == "alive"


@pytest.mark.gvisor_only(reason="no signal reaches the first process of a microVM's own kernel")
@pytest.mark.parametrize("signal", ["KILL", pytest.param("STOP", marks=pytest.mark.long)])
def test_a_guest_that_ends_or_stops_its_agent_harms_itself(api: Api, base: str, neighbour: Room, signal: str) -> None:
    room = api.room(base)
    room.output("echo kept > kept.txt; sync")
    answer = room.post(f"sudo kill -{signal} 1; sleep 60", timeout=1)
    assert answer.status_code in (500, 502, 503), answer.text
    assert set(answer.json()) >= {"error", "message"} and neighbour.output("echo alive") == "alive"
    room.create()
    assert room.output("cat kept.txt") == "kept"
    room.delete()


@pytest.mark.microvms_only
@pytest.mark.parametrize(
    "key", ["c", pytest.param("o", marks=pytest.mark.long), pytest.param("b", marks=pytest.mark.long)]
)
def test_a_guest_that_crashes_or_ends_its_kernel_harms_itself(api: Api, base: str, neighbour: Room, key: str) -> None:
    room = api.room(base)
    room.output("echo kept > kept.txt; sync")
    answer = room.post(f"sudo kill -KILL 1; echo {key} | sudo tee /proc/sysrq-trigger; sleep 600")
    assert answer.status_code in (500, 502, 503), answer.text
    assert set(answer.json()) >= {"error", "message"} and neighbour.output("echo alive") == "alive"
    room.create()
    assert room.output("cat kept.txt") == "kept"
    room.delete()


@pytest.mark.microvms_only
def test_root_that_takes_the_port_from_its_agent_harms_itself(api: Api, base: str, neighbour: Room) -> None:
    """What can be done with the port: test_hostile_port.py."""
    room = api.room(base)
    room.create()
    room.put("/tmp/port_thief.py", (PROGRAMS / "port_thief.py").read_bytes())
    answer = room.post("sudo python3 /tmp/port_thief.py", timeout=60)
    assert answer.status_code in (500, 502, 503), answer.text
    assert "broke the protocol" in answer.json()["message"], answer.text
    assert neighbour.output("echo alive") == "alive"
    room.delete()


def test_starting_processes_leak_no_descriptor_of_the_agent(attacker: Room) -> None:
    attacker.output("rm -f /tmp/thief.stop")
    result: list[str] = []
    thief = threading.Thread(target=lambda: result.append(run_program(attacker, "thief")))
    thief.start()
    try:
        time.sleep(0.5)
        for number in range(25):
            assert attacker.output(f"sudo true; echo {number}") == str(number)
    finally:
        attacker.put("/tmp/thief.stop", b"")
        thief.join()
    looked, got = json.loads(result[0])
    assert looked > 100, "the thief looked into processes"
    assert got == []


def test_environment_of_the_agent_has_no_secret(attacker: Room, innkeeper: Server) -> None:
    environment = attacker.output("sudo cat /proc/1/environ | tr '\\0' '\\n' | cut -d= -f1").split()
    assert set(environment) <= {"PATH", "HOME", "LANG", "TERM"}
    everything = attacker.output(
        "sudo cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | sort -u"
    )
    assert innkeeper.token not in everything and str(innkeeper.home) not in everything
    # Nor do the guest's own tables of mounts and disks name places of the host.
    tables = attacker.output(
        "cat /proc/mounts /proc/self/mountinfo /proc/partitions /proc/swaps /proc/cmdline 2>/dev/null; true"
    )
    assert str(innkeeper.home) not in tables and "/var/tmp" not in tables
