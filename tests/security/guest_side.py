"""What attacks need on both sides of the wall: programs that run in a guest, and a firewall that can be opened for a control."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from server_fixture import Room, Server

PROGRAMS = Path(__file__).parent / "guest_programs"
Target = tuple[str, str, int]


def run_program(room: Room, name: str, *words: str, root: bool = False, **extras: Any) -> str:
    """The output of `guest_programs/<name>.py` in a guest; it has to succeed."""
    path = f"/tmp/{name}.py"
    assert room.put(path, (PROGRAMS / f"{name}.py").read_bytes()).status_code in (200, 201, 204)
    return room.output(" ".join(["sudo" if root else "", "python3", path, *words]), **extras)


def knock(room: Room, targets: Sequence[Target], **extras: Any) -> dict[Target, str]:
    """What a guest gets from each target."""
    room.put("/tmp/targets.json", json.dumps(targets).encode())
    answers = json.loads(run_program(room, "knock", "/tmp/targets.json", **extras))
    return dict(zip(targets, answers, strict=True))


def reached(answers: dict[Target, str]) -> list[Target]:
    """The targets that were reached."""
    return [target for target, answer in answers.items() if answer == "reached"]


@contextlib.contextmanager
def firewall_off(server: Server, host: str) -> Iterator[None]:
    """The rules of the router and of the host let everything pass: what is reached now and was not before, the firewall had kept away."""
    router, table = f"ik{server.server_id}-router", f"inet innkeeper_{server.server_id}"
    chains = [(router, "ip innkeeper", chain) for chain in ("arrival", "local", "transit")]
    chains += [(host, table, chain) for chain in ("arrival", "local", "transit")]
    undo = []
    try:
        for namespace, where, chain in chains:
            said = nft(namespace, "--echo", "--handle", "insert", "rule", *where.split(), chain, "accept")
            found = re.search(r"# handle (\d+)", said)
            assert found, said
            undo.append((namespace, where, chain, found[1]))
        yield
    finally:
        for namespace, where, chain, handle in undo:
            nft(namespace, "delete", "rule", *where.split(), chain, "handle", handle)


def nft(namespace: str, *words: str) -> str:
    """nft in a namespace; its output."""
    return subprocess.run(
        ["ip", "netns", "exec", namespace, "nft", *words], check=True, capture_output=True, text=True
    ).stdout


def tracked_connections(namespace: str) -> Counter[str]:
    """How many live entries the connection table of a namespace has, by their TCP state. Those that ran out stay in the kernel's own count until it
    cleans up or needs the room.
    """
    listed = subprocess.run(
        ["ip", "netns", "exec", namespace, "cat", "/proc/net/nf_conntrack"], check=True, capture_output=True, text=True
    )
    return Counter(line.split()[5] if " tcp " in line else "other" for line in listed.stdout.splitlines())
