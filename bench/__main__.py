"""`python -m bench`: every performance row of the project, against a real server of its own, beside its peers."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import structlog
from tests.integration.image_fixture import put_into

from bench import (
    burst,
    changes,
    checkpoints,
    commands,
    drivers,
    executions,
    idle,
    moments,
    ports,
    report,
    rooms,
    ssh,
    startup,
    states,
    sustained,
    terminals,
    transfers,
)
from bench.peers import Peers
from bench.rows import Row
from bench.server import VCPU_COUNT, Server
from innkeeper.host.disks.image_store import ImageStore

# In the order in which they run: the start of the server comes first, because the others need one.
GROUPS = (
    "startup",
    "rooms",
    "commands",
    "executions",
    "changes",
    "idle",
    "checkpoints",
    "drivers",
    "moments",
    "states",
    "transfers",
    "ports",
    "terminals",
    "ssh",
    "burst",
    "sustained",
)


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "--only", metavar="GROUP", action="append", choices=GROUPS, help=f"one of {', '.join(GROUPS)}; repeatable"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything, samples included")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table as Markdown")
    parser.add_argument(
        "--quick", action="store_true", help="few samples: minutes become half a minute, and noise with it"
    )
    parser.add_argument("--long", action="store_true", help="also 100 frozen guests")
    parser.add_argument(
        "--platform", choices=("systrap", "ptrace"), help="instead of the one that the server takes by itself"
    )
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    if os.geteuid() != 0:
        sys.exit("bench: needs root")
    before = report.machine()
    rows, reason = asyncio.run(measure(options))
    after = report.machine()["load"]
    title = (
        f"{before['at']}, {before['cpus']} x {before['cpu']}, kernel {before['kernel']}, gVisor on {reason}\n"
        f"load {before['load'][0]} before, {after[0]} after"
    )
    report.print_table(rows, title=title)
    if options.json:
        options.json.write_text(json.dumps(report.as_json(rows, before=before, platform_reason=reason), indent=1))
    if options.markdown:
        options.markdown.write_text(report.markdown(rows) + "\n")


async def measure(options: argparse.Namespace) -> tuple[list[Row], str]:
    """The rows of the groups that were asked for, and the platform with why it was taken."""
    groups = options.only or GROUPS
    tries = 5 if options.quick else 30
    rows: list[Row] = []
    home = make_home()
    host_dir = home / "host"
    server = Server(home, platform=options.platform)
    peer_images = ImageStore(home / "peer-images")
    try:
        server.start()
        if "startup" in groups:
            rows += startup.measure(server, tries=2 if options.quick else 5)
            say(rows)
        host = server.host()
        put_into(home / "peer-images", "base")
        image = peer_images.get("base")
        assert image is not None
        peers = Peers(
            home / "peers",
            image=peer_images.mount(image.digest),
            agent_dir=next((host_dir / "agent").iterdir()),
            platform=host["platform"],
            vcpu_count=VCPU_COUNT,
        )
        async with peers.up():
            for group in groups:
                if group == "rooms":
                    found = list(rooms.measure(server, peers, tries=tries))
                elif group == "commands":
                    found = await commands.measure(server, peers, tries=tries * 2)
                elif group == "executions":
                    found = executions.measure(server, tries=tries)
                elif group == "changes":
                    found = await changes.measure(
                        server, sizes=(1_000, 10_000) if options.quick else (1_000, 10_000, 100_000)
                    )
                elif group == "idle":
                    found = idle.measure(server, counts=(20, 100) if options.long else (20,))
                elif group == "checkpoints":
                    found = await asyncio.to_thread(
                        checkpoints.measure, home / "checkpoints", platform=host["platform"], tries=tries // 2 + 1
                    )
                elif group == "drivers":
                    found = await asyncio.to_thread(drivers.measure, tries=tries // 2 + 1)
                elif group == "moments":
                    found = await asyncio.to_thread(moments.measure, tries=3 if options.quick else 5)
                elif group == "states":
                    found = await asyncio.to_thread(states.measure, tries=5 if options.quick else 10)
                elif group == "burst":
                    found = await asyncio.to_thread(burst.measure, server, tries=1 if options.quick else 3)
                elif group == "sustained":
                    found = await sustained.measure(server, peers, tries=1 if options.quick else 3)
                elif group == "terminals":
                    found = await terminals.measure(server, peers, tries=tries * 4)
                elif group == "ssh":
                    found = ssh.measure(server, tries=tries)
                elif group == "ports":
                    found = ports.measure(server, tries=3 if options.quick else 8)
                elif group == "transfers":
                    found = await transfers.measure(server, peers, tries=3 if options.quick else 8)
                else:
                    continue
                rows += found
                say(found)
        return rows, f"{host['platform']}: {host['reason']}"
    finally:
        server.stop()
        await peer_images.unmount_all()
        server.remove()


def make_home() -> Path:
    """A state directory with the base image in it."""
    # Not /tmp: where that is memory, the disks would be too.
    home = Path(tempfile.mkdtemp(prefix="innbench-", dir="/var/tmp"))
    home.chmod(0o755)
    (home / "host").mkdir(mode=0o700)
    put_into(home / "host", "base")
    return home


def say(rows: list[Row]) -> None:
    """What is known so far, while the rest is measured."""
    load = os.getloadavg()[0]
    for row in rows:
        row.load = load
        print(
            f"{row.title}: {report.number(row.median)} ({report.number(row.p95)}) {row.unit} {report.verdict(row)}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
