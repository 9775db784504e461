"""VMs, snapshots and volumes under random verbs, `kill -9` of the server among them, against a model: nothing that was acknowledged is lost, nothing leaks.

What a guest's memory holds is a file in /dev/shm: it comes back with the memory, and with nothing else. A verb during which the server is killed has an
outcome that nobody was told: either is right, and the model takes over which it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from server_fixture import Server, server
from tests.faults import census
from tests.faults.victims import SERVERS, come_back, kill

SHAPE = {"vm_lifetime_seconds": 3_600, "memory_mb": 256, "vcpu_count": 1, "image_variant": "base"}
QUOTA_BYTES = 64 << 20
VMS, SNAPSHOTS, VOLUMES, CHECKPOINTS = 3, 3, 2, 2
# How far into a verb the server is killed.
INSTANTS = (0.0, 0.05, 0.2, 0.5)
SECONDS = 300.0
# What each takes, more or less: a kill is anywhere in it, or just after.
LONGEST_SECONDS = {"suspend": 0.5, "resume": 1.0, "clone": 1.5, "fork": 2.0}
SEED_VARIABLE = "STATES_SEED"


@dataclasses.dataclass
class Guest:
    """What a VM, or a snapshot, must have: what its disk and its memory say, and at which paths it has which volumes."""

    id: str
    disk: str = ""
    memory: str = ""
    mounts: dict[str, str] = dataclasses.field(default_factory=dict)


class States(RuleBasedStateMachine):
    """One run: a new set of everything on a server that stays."""

    running: Server
    killed: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.vms: list[Guest] = []
        self.snapshots: list[Guest] = []
        self.volumes: dict[str, str] = {}
        # Of volumes: whose, and what each says.
        self.checkpoints: dict[str, tuple[str, str]] = {}
        self.written = 0
        self._client: httpx2.Client | None = None

    # --- asking ------------------------------------------------------------------------------------------------------

    @property
    def client(self) -> httpx2.Client:
        if self._client is None or self._client.is_closed:
            self._client = self.running.client(timeout_seconds=SECONDS)
        return self._client

    def ok(self, method: str, path: str, **more: Any) -> Any:
        answer = self.client.request(method, path, **more)
        assert answer.status_code == 200, (method, path, answer.text)
        return answer.json()

    def inside(self, vm: Guest, line: str) -> str:
        said = self.ok("POST", f"/v1/vms/{vm.id}/exec", json={"command": line})
        assert said["exit_code"] == 0, said
        return str(said["stdout"])

    def killed_during(self, work: Callable[[], object], data: st.DataObject) -> None:
        """Do it, and kill the server meanwhile; how it ended nobody knows."""
        self.killed_after(data.draw(st.sampled_from(INSTANTS)), data.draw(st.sampled_from(SERVERS)), work)

    def killed_after(self, instant: float, victim: str, work: Callable[[], object]) -> None:
        """Likewise, so many seconds after it began."""

        def quietly() -> None:
            with contextlib.suppress(httpx2.TransportError, AssertionError, ValueError):
                work()

        asking = threading.Thread(target=quietly)
        asking.start()
        time.sleep(instant)
        kill(self.running, victim, random.Random(0))
        asking.join()
        come_back(self.running, victim)
        self._client = None
        type(self).killed += 1

    def listed(self, path: str) -> dict[str, Any]:
        return {one["id"] if "id" in one else one["vm_id"]: one for one in self.ok("GET", path)}

    def drop_strangers(self) -> None:
        """What a verb has made that was never answered goes: it is somebody's who does not know of it."""
        for vm in self.vms:
            # One that was resumed has a newer id.
            vm.id = self.ok("GET", f"/v1/vms/{vm.id}")["vm_id"]
        known = {vm.id for vm in self.vms}
        for one in self.ok("GET", "/v1/vms/"):
            if one["status"] != "killed" and one["vm_id"] not in known:
                self.settled(lambda one=one: self.client.delete(f"/v1/vms/{one['vm_id']}"))
        for volume in self.volumes:
            for identity in self.listed(f"/v1/volumes/{volume}/checkpoints").keys() - self.checkpoints.keys():
                path = f"/v1/volumes/{volume}/checkpoints/{identity}"
                self.settled(lambda path=path: self.client.delete(path))
        for path, mine in (("/v1/snapshots", {one.id for one in self.snapshots}), ("/v1/volumes", set(self.volumes))):
            for identity in self.listed(path).keys() - mine:
                self.settled(lambda path=path, identity=identity: self.client.delete(f"{path}/{identity}"))

    def settled(self, ask: Callable[[], httpx2.Response]) -> None:
        """Ask until it is done: what was cut short is being finished meanwhile."""
        deadline = time.monotonic() + SECONDS
        while (answer := ask()).status_code not in (200, 404):
            assert answer.status_code in (409, 503) and time.monotonic() < deadline, answer.text
            time.sleep(0.2)

    # --- what is true at any moment ----------------------------------------------------------------------------------

    def check(self, vm: Guest) -> None:
        """Its disk, its memory and its volumes say what they should; a VM that is suspended wakes by that."""
        lines = "cat /root/state 2>/dev/null; echo; cat /dev/shm/state 2>/dev/null; echo"
        assert self.inside(vm, lines).split("\n")[:2] == [vm.disk, vm.memory], vm
        found = {one["mount_path"]: one["volume_id"] for one in self.ok("GET", f"/v1/vms/{vm.id}/volumes")}
        assert found == vm.mounts, vm
        for path, volume in vm.mounts.items():
            assert self.inside(vm, f"cat {path}/state 2>/dev/null || true").strip() == self.volumes[volume], (vm, path)

    def pick(self, data: st.DataObject, among: list[Guest]) -> Guest:
        return among[data.draw(st.integers(0, len(among) - 1))]

    # --- the verbs -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.vms) < VMS)
    @rule()
    def make(self) -> None:
        self.vms.append(Guest(self.ok("POST", "/v1/vms", json=SHAPE)["vm_id"]))

    @precondition(lambda self: self.vms)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        self.write_into(self.pick(data, self.vms))

    def write_into(self, vm: Guest) -> None:
        self.written += 1
        paths = ["/root", "/dev/shm", *vm.mounts]
        self.inside(vm, "; ".join(f"echo -n {self.written} > {path}/state" for path in paths) + "; sync")
        vm.disk = vm.memory = str(self.written)
        for volume in vm.mounts.values():
            self.volumes[volume] = str(self.written)

    @precondition(lambda self: self.vms and len(self.snapshots) < SNAPSHOTS)
    @rule(data=st.data())
    def snapshot(self, data: st.DataObject) -> None:
        vm = self.pick(data, self.vms)
        taken = self.ok("POST", f"/v1/vms/{vm.id}/snapshot", json={})
        self.snapshots.append(Guest(taken["id"], vm.disk, vm.memory))

    @precondition(lambda self: self.snapshots and len(self.vms) < VMS)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        of = self.pick(data, self.snapshots)
        made = self.ok("POST", "/v1/vms", json={"vm_lifetime_seconds": 3_600, "snapshot_id": of.id})
        self.vms.append(Guest(made["vm_id"], of.disk, of.memory))
        self.check(self.vms[-1])

    @precondition(lambda self: self.vms and len(self.vms) < VMS)
    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        vm = self.pick(data, self.vms)
        made = self.ok("POST", f"/v1/vms/{vm.id}/clone", json={})
        self.vms.append(Guest(made["vm_id"], vm.disk, vm.memory))
        self.check(self.vms[-1])

    @precondition(lambda self: self.vms and len(self.vms) < VMS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        vm = self.pick(data, self.vms)
        count = VMS - len(self.vms)
        for made in self.ok("POST", f"/v1/vms/{vm.id}/fork", json={"count": count})["vms"]:
            assert made["error"] is None, made
            self.vms.append(Guest(made["vm_id"], vm.disk, vm.memory))
            self.check(self.vms[-1])

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def verify(self, data: st.DataObject) -> None:
        one = self.pick(data, self.snapshots)
        told = self.ok("POST", f"/v1/snapshots/{one.id}/verify", json={})
        assert (told["status"], told["damaged"]) == ("ready", False), told

    @precondition(lambda self: self.vms)
    @rule(data=st.data(), wake=st.booleans())
    def suspend(self, data: st.DataObject, wake: bool) -> None:
        vm = self.pick(data, self.vms)
        assert self.ok("POST", f"/v1/vms/{vm.id}/suspend")["status"] == "suspended"
        if wake:
            vm.id = self.ok("POST", f"/v1/vms/{vm.id}/resume")["vm_id"]

    @precondition(lambda self: len(self.volumes) < VOLUMES)
    @rule()
    def make_volume(self) -> None:
        made = self.ok("POST", "/v1/volumes", json={"name": "v", "quota_bytes": QUOTA_BYTES})
        self.volumes[made["id"]] = ""

    def free_volumes(self) -> list[str]:
        taken = {volume for vm in self.vms for volume in vm.mounts.values()}
        return sorted(set(self.volumes) - taken)

    @precondition(lambda self: self.vms and self.free_volumes())
    @rule(data=st.data())
    def mount(self, data: st.DataObject) -> None:
        vm, volume = self.pick(data, self.vms), self.free_volumes()[0]
        path = f"/mnt/{volume}"
        self.ok("POST", f"/v1/vms/{vm.id}/volumes", json={"volume_id": volume, "mount_path": path})
        vm.mounts[path] = volume

    @precondition(lambda self: any(vm.mounts for vm in self.vms))
    @rule()
    def unmount(self) -> None:
        vm = next(vm for vm in self.vms if vm.mounts)
        path, volume = vm.mounts.popitem()
        self.ok("DELETE", f"/v1/vms/{vm.id}/volumes/{volume}", params={"mount_path": path})

    @precondition(lambda self: self.volumes and len(self.checkpoints) < CHECKPOINTS)
    @rule(data=st.data())
    def keep_volume(self, data: st.DataObject) -> None:
        volume = data.draw(st.sampled_from(sorted(self.volumes)))
        kept = self.ok("POST", f"/v1/volumes/{volume}/checkpoints", json={"name": "c"})
        self.checkpoints[kept["id"]] = (volume, self.volumes[volume])

    @precondition(lambda self: self.vms and self.checkpoints)
    @rule(data=st.data())
    def read_kept_volume(self, data: st.DataObject) -> None:
        vm, kept = self.pick(data, self.vms), data.draw(st.sampled_from(sorted(self.checkpoints)))
        volume, said = self.checkpoints[kept]
        mount = {"volume_id": volume, "checkpoint_id": kept, "mount_path": "/kept", "mode": "ro"}
        self.ok("POST", f"/v1/vms/{vm.id}/volumes", json=mount)
        assert self.inside(vm, "cat /kept/state 2>/dev/null || true").strip() == said, kept
        self.ok("DELETE", f"/v1/vms/{vm.id}/volumes/{volume}", params={"mount_path": "/kept"})

    @precondition(lambda self: self.checkpoints)
    @rule(data=st.data())
    def delete_kept_volume(self, data: st.DataObject) -> None:
        kept = data.draw(st.sampled_from(sorted(self.checkpoints)))
        volume, _ = self.checkpoints.pop(kept)
        self.ok("DELETE", f"/v1/volumes/{volume}/checkpoints/{kept}")

    @precondition(lambda self: self.vms)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        vm = self.pick(data, self.vms)
        self.ok("DELETE", f"/v1/vms/{vm.id}")
        self.vms.remove(vm)

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def delete_snapshot(self, data: st.DataObject) -> None:
        one = self.pick(data, self.snapshots)
        self.ok("DELETE", f"/v1/snapshots/{one.id}")
        self.snapshots.remove(one)

    @precondition(lambda self: self.vms)
    @rule(data=st.data(), verb=st.sampled_from(("snapshot", "clone", "fork", "suspend", "resume", "nothing")))
    def kill_during(self, data: st.DataObject, verb: str) -> None:
        vm = self.pick(data, self.vms)
        self.killed_during((lambda: None) if verb == "nothing" else self.asking(vm, verb), data)
        self.check_all()

    def asking(self, vm: Guest, verb: str) -> Callable[[], object]:
        """What asks for a verb of a VM."""
        body: dict[str, Any] | None = {"fork": {"count": 2}, "suspend": None, "resume": None}.get(verb, {})
        path = f"/v1/vms/{vm.id}/{verb}"
        return lambda: self.client.post(path, json=body)

    def check_all(self) -> None:
        # Whatever came of it: the VM, and all others, are what they were.
        for one in self.vms:
            self.check(one)
        self.drop_strangers()

    @precondition(lambda self: self.volumes)
    @rule(data=st.data())
    def kill_during_keeping_of_a_volume(self, data: st.DataObject) -> None:
        volume = data.draw(st.sampled_from(sorted(self.volumes)))
        path = f"/v1/volumes/{volume}/checkpoints"
        self.killed_during(lambda: self.client.post(path, json={"name": "c"}), data)
        self.check_all()

    @precondition(lambda self: self.vms and self.free_volumes())
    @rule(data=st.data())
    def kill_during_mount(self, data: st.DataObject) -> None:
        vm, volume = self.pick(data, self.vms), self.free_volumes()[0]
        path = f"/mnt/{volume}"
        body = {"volume_id": volume, "mount_path": path}
        self.killed_during(lambda: self.client.post(f"/v1/vms/{vm.id}/volumes", json=body), data)
        # What the model has must be possible now, whatever came of it.
        self.settled(lambda: self.client.post(f"/v1/vms/{vm.id}/volumes", json=body))
        vm.mounts[path] = volume
        self.check(vm)

    def teardown(self) -> None:
        for vm in self.vms:
            self.check(vm)
            self.ok("DELETE", f"/v1/vms/{vm.id}")
        for one in self.snapshots:
            self.ok("DELETE", f"/v1/snapshots/{one.id}")
        for kept, (volume, _) in self.checkpoints.items():
            self.ok("DELETE", f"/v1/volumes/{volume}/checkpoints/{kept}")
        for volume in self.volumes:
            self.settled(lambda volume=volume: self.client.delete(f"/v1/volumes/{volume}"))
        assert self.listed("/v1/snapshots") == {} and self.listed("/v1/volumes") == {}
        assert census.wait_for_none(self.running.home) == []


@pytest.fixture(scope="module")
def running(driver: str) -> Iterator[Server]:
    with server("base", driver=driver, INNKEEPER_FREEZE_AFTER_SECONDS="0.5", INNKEEPER_ROOM_WAIT_SECONDS="60") as made:
        yield made


def run(running: Server, *, examples: int, steps: int) -> None:
    of_this = type("OfThis", (States,), {"running": running})
    run_state_machine_as_test(
        of_this,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    print(f"{of_this.killed} kills")


def test_nothing_acknowledged_is_lost(running: Server) -> None:
    run(running, examples=1, steps=12)


# As many steps as take ten minutes with gVisor, and half an hour with guests whose instructions are translated.
@pytest.mark.timeout(5_400)
@pytest.mark.long
def test_nothing_acknowledged_is_lost_in_the_long_run(running: Server) -> None:
    run(running, examples=10, steps=40)


def kills(running: Server, pairs: Sequence[tuple[str, str]]) -> None:
    """One kill after the other, each at a random instant of a verb that was asked of a VM, running or suspended."""
    seed = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(1 << 32))
    print(f"{SEED_VARIABLE}={seed}")
    chance = random.Random(seed)
    states = type("OfThis", (States,), {"running": running})()
    states.make()
    (vm,) = states.vms
    for verb, victim in pairs:
        states.write_into(vm)
        asleep = verb == "resume" or (verb in ("clone", "fork") and chance.random() < 0.5)
        if asleep:
            states.ok("POST", f"/v1/vms/{vm.id}/suspend")
        instant = chance.uniform(0, LONGEST_SECONDS[verb])
        print(f"{victim} {instant:.2f} s into {verb} of {'a suspended' if asleep else 'a running'} VM")
        states.killed_after(instant, victim, states.asking(vm, verb))
        states.check_all()
    states.teardown()


def test_kills_at_random_instants_of_sleep_and_of_copies(running: Server) -> None:
    kills(running, tuple(zip(LONGEST_SECONDS, ("daemon", "both", "api", "api"), strict=True)))


@pytest.mark.timeout(3_600)
@pytest.mark.long
def test_many_kills_at_random_instants_of_sleep_and_of_copies(running: Server) -> None:
    kills(running, [(verb, victim) for verb in LONGEST_SECONDS for victim in SERVERS for _ in range(3)])
