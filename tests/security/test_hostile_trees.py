"""Trees that a guest makes to keep the change scanner busy, astray or full: it ends in time, stays small, follows nothing, and the next guest does not wait."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from guest_side import PROGRAMS, run_program
from server_fixture import Room, Server, children, command_line, until
from tests.security.neighbour import proportional_mib

# A scan of a directory holds its names: 64 MiB at most, and what Go keeps besides.
SCANNER_MIB = 250.0


def scanner(innkeeper: Server) -> int:
    assert innkeeper.process is not None
    (found,) = [pid for pid in children(innkeeper.process.pid) if command_line(pid).endswith(b"inn-agent\0scan\0")]
    return found


def timed(room: Room, command: str) -> float:
    began = time.monotonic()
    room.output(command)
    return time.monotonic() - began


def test_a_tree_that_changes_during_every_scan(attacker: Room, neighbour: Room, innkeeper: Server) -> None:
    scans = scanner(innkeeper)
    attacker.put("/tmp/churn_tree.py", (PROGRAMS / "churn_tree.py").read_bytes())
    attacker.output("(nohup python3 /tmp/churn_tree.py /home/user/tree > /dev/null 2>&1 &)")
    until(lambda: attacker.run("test -e tree.made")["result"]["exit_code"] == 0)
    slowest = 0.0
    for _ in range(12):
        began = time.monotonic()
        rows = attacker.run("true")["result"]["files_changed"]
        slowest = max(slowest, time.monotonic() - began)
        # Links to /etc were made and scanned: what lies behind them is nobody's change.
        assert [row["path"] for row in rows if not row["path"].startswith(("/home/user/", "/tmp/"))] == []
        assert neighbour.output("echo x") == "x"
    attacker.output("touch tree.stop")
    assert scanner(innkeeper) == scans, "the scanner is still the same process"
    assert proportional_mib(scans) < SCANNER_MIB
    attacker.run("rm -rf tree*")
    assert attacker.changes("echo 1 > after.txt") == {"/home/user/after.txt": "created"}
    print(f"12 commands while the tree changes: the slowest {slowest:.2f} s, scanner {proportional_mib(scans):.0f} MiB")


def test_deeper_than_any_path(attacker: Room, neighbour: Room, innkeeper: Server) -> None:
    scans, levels = scanner(innkeeper), 3_000
    run_program(attacker, "build_tree", "deep", str(levels), "/home/user/deep", timeout=120)
    took = timed(attacker, "echo 1 > beside.txt")
    assert attacker.changes("echo 2 > beside.txt") == {"/home/user/beside.txt": "modified"}
    assert timed(neighbour, "true") < 10
    assert scanner(innkeeper) == scans
    assert len(list(Path(f"/proc/{scans}/fd").iterdir())) < 100, "descriptors are given back"
    print(f"{levels} directories deep: the next command takes {took:.2f} s, scanner {proportional_mib(scans):.0f} MiB")


def wide(attacker: Room, neighbour: Room, innkeeper: Server, number: int) -> None:
    scans = scanner(innkeeper)
    run_program(attacker, "build_tree", "wide", str(number), "/home/user/wide", timeout=1800)
    beside = max(timed(neighbour, "true") for _ in range(3))
    answer = attacker.run("echo 1 > beside.txt")["result"]
    assert answer["exit_code"] == 0 and len(answer["files_changed"]) <= 1_000
    took = timed(attacker, "touch wide/file-00000000")
    assert scanner(innkeeper) == scans
    memory = proportional_mib(scans)
    print(
        f"{number} files in one directory: a command takes {took:.2f} s, a neighbour's {beside:.2f} s, scanner {memory:.0f} MiB"
    )
    assert memory < SCANNER_MIB


def test_a_wide_directory(attacker: Room, neighbour: Room, innkeeper: Server) -> None:
    wide(attacker, neighbour, innkeeper, 3_000)


@pytest.mark.long
@pytest.mark.gvisor_only(
    reason="a microVM scans itself, where instructions are translated for longer than a client waits"
)
def test_a_directory_with_half_a_million_files(attacker: Room, neighbour: Room, innkeeper: Server) -> None:
    wide(attacker, neighbour, innkeeper, 500_000)
