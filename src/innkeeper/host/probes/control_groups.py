"""Control groups: that one can really be made, frozen, thawed and removed."""

from __future__ import annotations

import asyncio
import os
import secrets

from innkeeper.host.linux import command
from innkeeper.host.linux.cgroup import CgroupTree, Group
from innkeeper.host.probes.check import Check, Findings

MOUNT_FIX = "mount -t cgroup2 none /sys/fs/cgroup"


async def probe_control_groups() -> Findings:
    """Controllers by name, then a group with a sleeping process in it through its whole life."""
    try:
        tree = CgroupTree.detect()
    except OSError as error:
        return Findings((Check("cgroups", False, str(error.strerror), MOUNT_FIX, required=True),))
    facts = {"cgroup_version": tree.version}
    missing = tree.missing()
    if missing:
        fix = (
            f"echo '{' '.join('+' + name for name in missing)}' > {tree.mounts['unified']}/cgroup.subtree_control"
            if tree.version == 2
            else "; ".join(
                f"mkdir -p /sys/fs/cgroup/{name} && mount -t cgroup -o {name} none /sys/fs/cgroup/{name}"
                for name in missing
            )
        )
        return Findings(
            (Check("cgroups", False, f"version {tree.version} without {', '.join(missing)}", fix, required=True),),
            facts,
        )
    try:
        await _live(tree)
    except (OSError, TimeoutError, command.CommandFailed) as error:
        detail = f"version {tree.version}, but a group cannot be made, frozen and removed: {error}"
        return Findings((Check("cgroups", False, detail, "mount -o remount,rw /sys/fs/cgroup", required=True),), facts)
    offered = "memory, cpu, pids, freezer"
    return Findings(
        (Check("cgroups", True, f"version {tree.version}: {offered}; freezing works", required=True),), facts
    )


async def _live(tree: CgroupTree) -> None:
    group = tree.server_root(f"innkeeper-probe-{os.getpid()}-{secrets.token_hex(4)}")
    sleeper: asyncio.subprocess.Process | None = None
    try:
        group.create()
        sleeper = await command.spawn(["sleep", "30"])
        group.add(sleeper.pid)
        await group.freeze(timeout_seconds=2)
        group.thaw()
    finally:
        # A cancellation may arrive while this waits, too: the task goes on, and is waited for once more.
        undoing = asyncio.ensure_future(_undo(group, sleeper))
        try:
            await asyncio.shield(undoing)
        except asyncio.CancelledError:
            await undoing
            raise


async def _undo(group: Group, sleeper: asyncio.subprocess.Process | None) -> None:
    group.thaw()  # SIGKILL reaches a frozen process only after the thaw
    if sleeper is not None:
        await command.end(sleeper)
    await group.remove()
