"""No two guests that come of one moment are alike: of a template, of a running VM, of a snapshot; and each knows what time it is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from server_fixture import Server

pytestmark = pytest.mark.microvms

# Quick, and as many as the word "many" asks for.
COUNTS = [pytest.param(3, id="3"), pytest.param(20, id="20", marks=pytest.mark.long)]
WORKERS = 2
REQUEST_SECONDS = 600
# How far a guest's clock may be from the host's, reading and answering included.
CLOCK_SECONDS = 2.0
# An old moment: longer ago than a clock may be wrong.
AGE_SECONDS = 3.0
# One line each, and none may be anybody else's. gVisor keeps no boot id of its own. The shell's own numbers come first: one that waits for its command since
# before the moment has the seed of that moment.
WHO = """
echo $RANDOM-$RANDOM-$RANDOM-$RANDOM
hostname; cat /etc/machine-id /sys/class/net/eth0/address /proc/sys/kernel/random/uuid
ip -4 -o addr show dev eth0 2> /dev/null | awk '{print $4}' || true
od -An -N16 -tx8 /dev/urandom
python3 -c 'import random, secrets, uuid; print(uuid.uuid4(), secrets.token_hex(8), random.random(), sep="\\n")'
"""
# A program that reads numbers without end, and notes each beside the name that its guest has then.
READ = "/dev/shm/read"
READS = f"""
import os, socket, time
with open("{READ}", "w", buffering=1) as file:
    while file.tell() < 4_000_000:
        file.write(f"{{socket.gethostname()}}={{os.urandom(8).hex()}}\\n")
        time.sleep(0.01)
"""


@dataclass
class Cloner:
    """A client that remembers which VMs it made."""

    api: httpx2.Client
    made: list[str]

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.api.post(path, json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def vm(self, **fields: Any) -> str:
        made = self.post("/v1/vms", memory_mb=512, vcpu_count=1, vm_lifetime_seconds=3_600, **fields)["vm_id"]
        self.made.append(made)
        return str(made)

    def said(self, vm: str, command: str) -> list[str]:
        answer = self.post(f"/v1/vms/{vm}/exec", command=command, timeout=300)
        assert answer["exit_code"] == 0, answer
        return str(answer["stdout"]).split()

    def check_all_differ(self, vms: list[str]) -> None:
        with ThreadPoolExecutor(WORKERS) as workers:
            told = list(workers.map(lambda vm: self.said(vm, WHO), vms))
        assert len({len(rows) for rows in told}) == 1, told
        alike = [rows for rows in zip(*told, strict=True) if len(set(rows)) < len(rows)]
        assert alike == [], alike
        for vm in vms:
            self.check_clock(vm)

    def check_clock(self, vm: str) -> None:
        before = time.time()
        (told,) = self.said(vm, "date +%s.%N")
        assert before - CLOCK_SECONDS < float(told) < time.time() + CLOCK_SECONDS, (before, told)


@pytest.fixture
def cloner(innkeeper: Server) -> Iterator[Cloner]:
    made = Cloner(innkeeper.client(), [])
    made.api.timeout = REQUEST_SECONDS
    yield made
    for vm in made.made:
        made.api.delete(f"/v1/vms/{vm}")


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("count", COUNTS)
def test_of_a_template(cloner: Cloner, count: int) -> None:
    with ThreadPoolExecutor(WORKERS) as workers:
        vms = list(workers.map(lambda _: cloner.vm(), range(count)))
    cloner.check_all_differ(vms)


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("count", COUNTS)
def test_of_a_running_vm(cloner: Cloner, count: int) -> None:
    vm = cloner.vm()
    made = cloner.post(f"/v1/vms/{vm}/fork", count=count)["vms"]
    cloner.made += [one["vm_id"] for one in made if one["vm_id"]]
    assert [one["status"] for one in made] == ["active"] * count, made
    cloner.check_all_differ([vm, *(one["vm_id"] for one in made)])


def test_of_an_old_snapshot(cloner: Cloner) -> None:
    vm = cloner.vm()
    kept = cloner.post(f"/v1/vms/{vm}/snapshot", name="old")["id"]
    taken = time.time()
    try:
        time.sleep(AGE_SECONDS)
        vms = [vm, *(cloner.post("/v1/vms", snapshot_id=kept, vm_lifetime_seconds=3_600)["vm_id"] for _ in range(2))]
        cloner.made += vms[1:]
        assert time.time() - taken > CLOCK_SECONDS
        cloner.check_all_differ(vms)
    finally:
        cloner.api.delete(f"/v1/snapshots/{kept}")


@pytest.mark.timeout(1_200)
def test_numbers_that_a_program_reads_after_the_moment(cloner: Cloner) -> None:
    """One that runs on in every clone: from when its guest has a name of its own, nobody else's kernel gives it the same numbers."""
    vm = cloner.vm()
    cloner.said(vm, f"cat > /tmp/reads.py << 'END'\n{READS}\nEND\nnohup python3 /tmp/reads.py > /dev/null 2>&1 &")
    cloner.said(vm, f"until [ -s {READ} ]; do sleep 0.1; done")
    made = cloner.post(f"/v1/vms/{vm}/fork", count=2)["vms"]
    cloner.made += [one["vm_id"] for one in made if one["vm_id"]]
    assert [one["status"] for one in made] == ["active"] * 2, made
    read = []
    for each in (vm, *(one["vm_id"] for one in made)):
        # It has read under this guest's name, which is given after the kernel got its numbers.
        numbers = cloner.said(
            each, f'until grep -m 1 "^$(hostname)=" {READ}; do sleep 0.1; done; grep "^$(hostname)=" {READ}'
        )
        read.append({line.partition("=")[2] for line in numbers})
    assert all(read)
    for one, other in itertools.combinations(read, 2):
        assert not one & other, one & other
