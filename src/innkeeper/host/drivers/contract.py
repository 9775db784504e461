"""What a driver does: run one machine. The contract suite (tests/contracts/test_drivers.py) runs on each driver.

Verbs are idempotent and tolerate "already gone". A driver owns the processes, cgroup and runtime files of a machine and
nothing else: disk, rootfs, network slot and link directory are made before `start` and released after `stop` by
`machine_builder`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from innkeeper.core.instance import Isolation
from innkeeper.core.leak import LeakKind
from innkeeper.errors import InnkeeperError, NotHereError
from innkeeper.host.linux.cgroup import Usage

AGENT_DIRECTORY = "/.innkeeper/bin"
LINK_DIRECTORY = "/.innkeeper/link"
VOLUMES_DIRECTORY = "/.innkeeper/volumes"


class StartFailedError(InnkeeperError):
    """The machine's process could not be started."""

    code = "start_failed"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a driver can do beyond the required verbs; use cases ask this, never a driver's name."""

    freeze: bool = False
    # The guest's files are mounted on the host, which scans them for what changed.
    host_sees_changes: bool = False
    # The memory of a running machine can be saved, and machines be started from it: the driver has the verbs of `Checkpointing`.
    checkpoint: bool = False
    # Likewise while the machine that it was saved of runs on.
    fork: bool = False
    # The disk of a running machine can be kept alone, its file system held still: by the host, which has mounted it, or by the guest's agent.
    disk_snapshot: bool = False
    # New machines can begin as clones of one that had come up, whose memory they share: the driver has the verbs of `Templating`.
    templates: bool = False
    # Volumes come to a running machine, and go: the driver has the verbs of `Attaching`.
    volumes: bool = False
    # A guest stands still where the host has no room for what it writes, and has to be told to go on: the driver has the verbs of `StandingStill`.
    stands_still: bool = False


@dataclass(frozen=True, slots=True)
class Needs:
    """What a driver's machines are made of, beyond state directory and namespace; whoever builds one asks this.

    `disk_files`: the root as the files of image and disk, which the host does not mount. `tap`: an open tap in place of the namespace's own
    interface. `dialled`: the host dials the guest's link, from the start on, and the guest may be paused and saved with it; else the guest does, the host
    listens before it, and the guest's agent has let go of it before it is paused. `clock`: the guest has a clock of its own, which stands still with it, and
    is told the time now and then; else it is the host's.
    """

    disk_files: bool = False
    tap: bool = False
    dialled: bool = False
    clock: bool = False


@dataclass(frozen=True, slots=True)
class DiskFiles:
    """The root of a machine that mounts it itself: an EROFS image, and an ext4 disk with upper and work (see disks/rootfs.py) on it."""

    image: Path
    disk: Path


@dataclass(frozen=True, slots=True)
class VolumeDisk:
    """A volume as a machine gets it: an ext4 file, and the 32 hexadecimal digits by which the guest's agent finds it."""

    name: str
    image: Path
    read_only: bool


@dataclass(frozen=True, slots=True)
class Tap:
    """A machine's end of its network: an open tap, which stays its maker's to close, and the only hardware address that may speak on it."""

    descriptor: int
    mac: str


@dataclass(frozen=True, slots=True)
class MachinePlan:
    """Everything that a machine is started from. `machine_id` is never used twice. `rootfs` is a mounted root unless the driver needs files."""

    machine_id: str
    rootfs: Path | DiskFiles
    hostname: str
    netns: Path
    agent_dir: Path
    link_dir: Path
    state_dir: Path
    memory_mb: int
    vcpu_count: int
    tap: Tap | None = None
    # It is to become a template.
    as_template: bool = False
    # The memory that it goes on from has this host name already.
    same_guest: bool = False


class RunningMachine(Protocol):
    """A started machine. `exited` is done when it no longer runs, whatever ended it."""

    machine_id: str
    exited: asyncio.Future[None]

    def ran_out_of_memory(self) -> bool:
        """Whether the host's kernel has killed a process of it for want of memory. It may run on, without that process."""
        ...

    def why(self) -> str:
        """The best known reason for its end, for the instance's `failure`."""
        ...


class Driver(Protocol):
    """A way to run machines."""

    name: str
    capabilities: Capabilities
    needs: Needs
    # How long its guests may take to say something while they start, in seconds: on a busy host, many times what they usually take.
    patience_seconds: float

    @property
    def isolation(self) -> Isolation:
        """What separates a guest of this driver from the host."""
        ...

    async def start(self, plan: MachinePlan) -> RunningMachine:
        """Start a machine; returns when its init runs (the agent dials in a little later). On failure nothing is left. Takes about 200 ms."""
        ...

    def runs(self, machine_id: str, state_dir: Path) -> bool:
        """Whether a machine runs that nobody has adopted."""
        ...

    async def adopt(self, machine_id: str, state_dir: Path) -> RunningMachine | None:
        """Take over a machine that survived a restart of the daemon, frozen or not; None when it does not run."""
        ...

    async def freeze(self, machine_id: str) -> None:
        """Take the processor time away; under a millisecond."""
        ...

    def is_frozen(self, machine_id: str) -> bool:
        """Whether the machine is frozen now."""
        ...

    def thaw(self, machine_id: str) -> None:
        """Give the processor time back; under a millisecond."""
        ...

    async def stop(self, machine_id: str) -> None:
        """End the machine at once and release what the driver made for it; nothing of it runs any more on return."""
        ...

    async def found(self) -> set[str]:
        """Ids of machines of this server that exist in any form (processes, cgroups, runtime files)."""
        ...

    def leftovers(self, keep: Set[str]) -> list[tuple[LeakKind, str, str]]:
        """What exists of machines that are not in `keep`: its kind, what it is, the machine's id. Takes milliseconds: call it in a thread."""
        ...

    async def end_strays(self, keep: Set[str]) -> int:
        """End every process of an earlier daemon that belongs to no machine of `keep`, a start that still goes on included; how many there were.

        What such a start had made by then is found by `found`.
        """
        ...

    async def close(self, *, keep_running: bool) -> None:
        """Let go of the machines, which run on; or stop them all and remove what the driver made for the server."""
        ...

    def usage(self, machine_id: str) -> Usage:
        """What the machine has used, the start of its guest included; zeros when it is gone."""
        ...


class Checkpointing(Driver, Protocol):
    """A driver with `capabilities.checkpoint`."""

    async def pause(self, machine_id: str) -> None:
        """Hold the guest still until `resume`: neither its memory nor its files change. Raises CheckpointFailedError, also for a frozen machine."""
        ...

    async def resume(self, machine_id: str) -> None:
        """Let a guest go on that `pause` or `saved` holds still, and give up what `saved` is about, also that of an earlier daemon.

        Harmless for one that runs, or is gone. Raises CheckpointFailedError when it stands still all the same.
        """
        ...

    def saved(
        self, machine_id: str, folder: Path, *, limit_bytes: int, on_still: Callable[[], None]
    ) -> AbstractAsyncContextManager[None]:
        """Write the guest's memory into an empty folder. Within the block it stands still, at the moment of that memory; then it goes on, as by `resume`.

        Much of it may be written while the guest still runs: `on_still` is called when it stops, or is about to. A driver that does so writes no more than
        `limit_bytes`; one that does not writes what the guest uses. Raises CheckpointFailedError with the reason; the guest then goes on, and is whole.
        """
        ...

    async def restore(self, plan: MachinePlan, folder: Path, *, whole: Awaitable[None] | None = None) -> RunningMachine:
        """Like `start`, but the guest goes on where it was saved, on a copy of the disk of that moment; not before `whole` has ended well, which raises
        CheckpointDamagedError where the folder is not what was saved.

        Host name and address are the plan's at once, or those of the guest that was saved until its agent is told others. Raises an error with the code
        start_failed; on failure nothing is left.
        """
        ...

    async def memory_needs(self) -> dict[str, str]:
        """What memory saved now depends on, by name: it can be restored where all of it is the same."""
        ...


def checkpointing(driver: Driver) -> Checkpointing:
    """The driver with its verbs for checkpoints. Raises NotHereError when it has none."""
    if not driver.capabilities.checkpoint:
        raise NotHereError(f"Checkpoints of memory are not possible with the driver {driver.name}")
    return cast(Checkpointing, driver)


class StandingStill(Driver, Protocol):
    """A driver with `capabilities.stands_still`."""

    async def stands_still(self, machine_id: str) -> bool:
        """Whether the guest waits for room to write. False as well where nobody can tell: it is frozen, being saved, or gone."""
        ...

    async def go_on(self, machine_id: str) -> None:
        """Have such a guest write again what it could not. Raises UnavailableError."""
        ...


def standing_still(driver: Driver) -> StandingStill:
    """The driver with its verbs for guests without room. Raises NotHereError when it has none."""
    if not driver.capabilities.stands_still:
        raise NotHereError(f"Guests of the driver {driver.name} do not wait for room")
    return cast(StandingStill, driver)


class Templating(Checkpointing, Protocol):
    """A driver with `capabilities.templates`."""

    async def keep(self, machine_id: str, folder: Path) -> None:
        """Write what clones need of a machine, beside its disk, into an empty folder. It was started `as_template`, and stands still from then on.

        Raises CheckpointFailedError.
        """
        ...

    async def clone(self, plan: MachinePlan, folder: Path) -> RunningMachine:
        """Like `start`, but the guest goes on where the one of a folder stood still, on a copy of that one's disk; many may share the folder's memory.

        Until it is configured it has the other's name and address, clock and random numbers. Raises StartFailedError; on failure nothing is left.
        """
        ...

    async def template_needs(self) -> dict[str, str]:
        """What a template depends on, by name: `memory_needs`, and what it booted."""
        ...

    def forget(self, folder: Path) -> None:
        """Hold nothing of a folder in memory any more. Clones that run are not touched."""
        ...

    def held_bytes(self) -> int:
        """What of the host's memory is held for clones beyond that of machines."""
        ...


def templating(driver: Driver) -> Templating:
    """The driver with its verbs for templates. Raises NotHereError when it has none."""
    if not driver.capabilities.templates:
        raise NotHereError(f"Templates are not possible with the driver {driver.name}")
    return cast(Templating, driver)


class Attaching(Driver, Protocol):
    """A driver with `capabilities.volumes`. What it attaches the guest's agent shows at a path (`mount_volume`), and hides before it is detached.

    Only one machine has a volume, but for those that may not write it; whoever attaches sees to that. `stop` detaches all, and so does the machine's end.
    """

    async def attach(self, machine_id: str, volume: VolumeDisk) -> None:
        """Let the machine's agent find a volume. Raises InstanceNotFoundError for a machine that is gone, GuestWrittenError, VolumeFailedError, OSError."""
        ...

    async def detach(self, machine_id: str, volume: VolumeDisk) -> None:
        """Take a volume away from the machine; fine for one that it has not, or when it is gone. Raises VolumeFailedError: it has it still."""
        ...

    def mounted_at(self, machine_id: str, volume: VolumeDisk) -> Path | None:
        """Where the host itself has mounted an attached volume, and may hold it still; None where the guest alone has."""
        ...

    async def has_let_go(self, machine_id: str, volume: VolumeDisk) -> bool:
        """Whether nothing of the machine holds a volume that was detached. A guest that used it may go on doing so until its agent has looked again."""
        ...


def attaching(driver: Driver) -> Attaching:
    """The driver with its verbs for volumes. Raises NotHereError when it has none."""
    if not driver.capabilities.volumes:
        raise NotHereError(f"Volumes are not possible with the driver {driver.name}")
    return cast(Attaching, driver)
