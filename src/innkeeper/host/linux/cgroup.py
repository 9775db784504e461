"""Control groups, version 1 (also hybrid) and version 2, behind one class: limits, freezer, usage, kill, removal."""

import asyncio
import contextlib
import errno
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from innkeeper.host.linux.mounts import Mount, all_mounts

CONTROLLERS_V1 = ("memory", "cpu", "cpuacct", "pids", "freezer")
CONTROLLERS_V2 = ("memory", "cpu", "pids")
CPU_PERIOD_US = 100_000
# The group of deploy/innkeeper-guests.service. Not the server's own: its processes would have to stay in a leaf, and systemd before 254
# cannot start a service again while groups below it are in use.
DELEGATED = "system.slice/innkeeper-guests.service"
_POLL_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group has used: processor time in microseconds, memory in bytes now, processes the OOM killer took."""

    cpu_us: int
    memory_bytes: int
    oom_kills: int


class Group(ABC):
    """One control group, addressed by its path below the tree's root: `/innkeeper-1a2b3c4d/guest-7`.

    Every verb is idempotent and tolerates a group that is gone. Writing to a group takes microseconds.
    """

    def __init__(self, path: str) -> None:
        self.path = "/" + path.strip("/")

    @abstractmethod
    def child(self, name: str) -> "Group":
        """The group `name` directly below this one; makes nothing."""

    @abstractmethod
    def directories(self) -> list[Path]:
        """Where this group lives: one directory on version 2, one for each hierarchy on version 1."""

    @abstractmethod
    def create(self) -> None:
        """Make the group, and those above it, in every hierarchy."""

    @abstractmethod
    def set_limits(self, *, memory_bytes: int | None, cpu_quota: float | None, pids_max: int | None) -> None:
        """Limit memory (swap included), processor time (in cores) and processes; None lifts a limit.

        A controller that this host does not have is passed over: `CgroupTree.missing()` names those.
        """

    @abstractmethod
    async def freeze(self, *, timeout_seconds: float = 5) -> None:
        """Stop every process of the group and below; returns when all stand still. Raises TimeoutError."""

    @abstractmethod
    def thaw(self) -> None:
        """Let the processes run again."""

    @abstractmethod
    def frozen(self) -> bool:
        """Whether every process stands still."""

    @abstractmethod
    def usage(self) -> Usage:
        """What the group has used; zeros when it is gone."""

    @abstractmethod
    def _signal_all(self) -> None:
        """SIGKILL everything in the group once."""

    def everywhere(self) -> list[Path]:
        """`directories`, and where else a runtime may have made the group."""
        return self.directories()

    def exists(self) -> bool:
        """Whether the group is there in any hierarchy."""
        return any(directory.is_dir() for directory in self.everywhere())

    def children(self) -> list[str]:
        """The names of the groups directly below, over all hierarchies."""
        names: set[str] = set()
        for directory in self.everywhere():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                names.update(entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False))
        return sorted(names)

    def procs(self) -> list[int]:
        """Every pid in the group and below."""
        pids: set[int] = set()
        for directory in self.directories():
            for below in _tree(directory):
                # ENODEV: the group went away between the walk and the read.
                with contextlib.suppress(OSError):
                    pids.update(int(pid) for pid in (below / "cgroup.procs").read_text().split())
        # 0 stands for a process of another pid namespace; as an argument of kill(2) it means ourselves.
        return sorted(pids - {0})

    def add(self, pid: int) -> None:
        """Move a process (with all its threads) into the group."""
        for directory in self.directories():
            (directory / "cgroup.procs").write_text(str(pid))

    async def kill_all(self, *, timeout_seconds: float = 10) -> None:
        """Kill everything in the group and wait until nothing is left in it. Raises TimeoutError.

        Zombies do not count: a process leaves its group when it dies, collected or not.
        """
        deadline = time.monotonic() + timeout_seconds
        while self.procs():
            if time.monotonic() > deadline:
                raise TimeoutError(f"cgroup {self.path}: still there after SIGKILL: {self.procs()[:8]}")
            self._signal_all()
            await asyncio.sleep(_POLL_SECONDS)

    async def remove(self, *, timeout_seconds: float = 5) -> None:
        """Remove the group and those below it, again while they are busy. Raises OSError when they stay busy."""
        deadline = time.monotonic() + timeout_seconds
        for directory in self.everywhere():
            for below in reversed(list(_tree(directory))):
                while True:
                    try:
                        below.rmdir()
                    except FileNotFoundError:
                        break
                    except OSError as error:
                        # A process that just died is still charged to its group for a moment.
                        if error.errno != errno.EBUSY or time.monotonic() > deadline:
                            raise
                        await asyncio.sleep(_POLL_SECONDS)
                    else:
                        break


class GroupV1(Group):
    """A group on version 1: the same path in each hierarchy that has one of our controllers."""

    def __init__(self, mounts: Mapping[str, Path], path: str, others: Sequence[Path] = ()) -> None:
        super().__init__(path)
        self._mounts = mounts
        self._others = others

    def child(self, name: str) -> "GroupV1":
        """See Group."""
        return GroupV1(self._mounts, f"{self.path}/{name}", self._others)

    def everywhere(self) -> list[Path]:
        """See Group. runsc makes a guest's group in every hierarchy of the host, whether it limits anything there or not."""
        return [*self.directories(), *(mount / self.path[1:] for mount in self._others)]

    def directories(self) -> list[Path]:
        """See Group."""
        return list(dict.fromkeys(mount / self.path[1:] for mount in self._mounts.values()))

    def create(self) -> None:
        """See Group."""
        for directory in self.directories():
            directory.mkdir(parents=True, exist_ok=True)

    def set_limits(self, *, memory_bytes: int | None, cpu_quota: float | None, pids_max: int | None) -> None:
        """See Group."""
        if memory := self._directory("memory"):
            self._limit_memory(memory, -1 if memory_bytes is None else memory_bytes)
        if cpu := self._directory("cpu"):
            (cpu / "cpu.cfs_period_us").write_text(str(CPU_PERIOD_US))
            (cpu / "cpu.cfs_quota_us").write_text(str(-1 if cpu_quota is None else quota_us(cpu_quota)))
        if pids := self._directory("pids"):
            (pids / "pids.max").write_text("max" if pids_max is None else str(pids_max))

    @staticmethod
    def _limit_memory(memory: Path, limit: int) -> None:
        plain, with_swap = memory / "memory.limit_in_bytes", memory / "memory.memsw.limit_in_bytes"
        if not with_swap.exists():
            plain.write_text(str(limit))
            return
        # The kernel demands limit <= limit with swap at every moment, so the order depends on the direction.
        try:
            plain.write_text(str(limit))
            with_swap.write_text(str(limit))
        except OSError:
            with_swap.write_text(str(limit))
            plain.write_text(str(limit))

    async def freeze(self, *, timeout_seconds: float = 5) -> None:
        """See Group."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            # Written again each time: a fork that raced with the first pass leaves the group FREEZING.
            self._freezer("FROZEN")
            if self.frozen():
                return
            if time.monotonic() > deadline:
                self.thaw()
                raise TimeoutError(f"cgroup {self.path}: not frozen after {timeout_seconds:g} s")
            await asyncio.sleep(_POLL_SECONDS)

    def thaw(self) -> None:
        """See Group."""
        with contextlib.suppress(OSError):
            self._freezer("THAWED")

    def frozen(self) -> bool:
        """See Group."""
        freezer = self._directory("freezer")
        return freezer is not None and _read(freezer / "freezer.state").strip() == "FROZEN"

    def usage(self) -> Usage:
        """See Group."""
        cpuacct, memory = self._directory("cpuacct"), self._directory("memory")
        return Usage(
            cpu_us=int(_read(cpuacct / "cpuacct.usage") or 0) // 1000 if cpuacct else 0,
            memory_bytes=int(_read(memory / "memory.usage_in_bytes") or 0) if memory else 0,
            oom_kills=flat_value(_read(memory / "memory.oom_control"), "oom_kill") if memory else 0,
        )

    def _signal_all(self) -> None:
        # Frozen while we go through the list, so that a fork bomb cannot outrun it; SIGKILL takes effect at the thaw.
        with contextlib.suppress(OSError):
            self._freezer("FROZEN")
        _kill(self.procs())
        self.thaw()

    def _directory(self, controller: str) -> Path | None:
        mount = self._mounts.get(controller)
        return None if mount is None else mount / self.path[1:]

    def _freezer(self, state: str) -> None:
        freezer = self._directory("freezer")
        if freezer is None:
            raise OSError(errno.EOPNOTSUPP, "this host has no cgroup freezer")
        (freezer / "freezer.state").write_text(state)


class GroupV2(Group):
    """A group on version 2."""

    def __init__(self, mount: Path, path: str) -> None:
        super().__init__(path)
        self._mount = mount

    def child(self, name: str) -> "GroupV2":
        """See Group."""
        return GroupV2(self._mount, f"{self.path}/{name}")

    @property
    def directory(self) -> Path:
        """The group's only directory."""
        return self._mount / self.path[1:]

    def directories(self) -> list[Path]:
        """See Group."""
        return [self.directory]

    def create(self) -> None:
        """See Group; hands our controllers down from each group above."""
        above = self._mount
        for part in Path(self.path[1:]).parts:
            offered = set(_read(above / "cgroup.controllers").split())
            handed = set(_read(above / "cgroup.subtree_control").split())
            if wanted := [f"+{name}" for name in CONTROLLERS_V2 if name in offered - handed]:
                (above / "cgroup.subtree_control").write_text(" ".join(wanted))
            above = above / part
            above.mkdir(exist_ok=True)

    def set_limits(self, *, memory_bytes: int | None, cpu_quota: float | None, pids_max: int | None) -> None:
        """See Group."""
        values = {
            "memory.max": "max" if memory_bytes is None else str(memory_bytes),
            "memory.swap.max": "max" if memory_bytes is None else "0",
            "cpu.max": f"{'max' if cpu_quota is None else quota_us(cpu_quota)} {CPU_PERIOD_US}",
            "pids.max": "max" if pids_max is None else str(pids_max),
        }
        for name, value in values.items():
            if (self.directory / name).exists():
                (self.directory / name).write_text(value)

    async def freeze(self, *, timeout_seconds: float = 5) -> None:
        """See Group."""
        (self.directory / "cgroup.freeze").write_text("1")
        deadline = time.monotonic() + timeout_seconds
        while not self.frozen():
            if time.monotonic() > deadline:
                self.thaw()
                raise TimeoutError(f"cgroup {self.path}: not frozen after {timeout_seconds:g} s")
            await asyncio.sleep(_POLL_SECONDS)

    def thaw(self) -> None:
        """See Group."""
        with contextlib.suppress(OSError):
            (self.directory / "cgroup.freeze").write_text("0")

    def frozen(self) -> bool:
        """See Group."""
        return flat_value(_read(self.directory / "cgroup.events"), "frozen") == 1

    def usage(self) -> Usage:
        """See Group."""
        return Usage(
            cpu_us=flat_value(_read(self.directory / "cpu.stat"), "usage_usec"),
            memory_bytes=int(_read(self.directory / "memory.current") or 0),
            oom_kills=flat_value(_read(self.directory / "memory.events"), "oom_kill"),
        )

    def _signal_all(self) -> None:
        # cgroup.kill (Linux 5.14) takes forks into account and reaches frozen processes too.
        try:
            with (self.directory / "cgroup.kill").open("r+") as kill:
                kill.write("1")
        except OSError:
            _kill(self.procs())
        self.thaw()


@dataclass(frozen=True, slots=True)
class CgroupTree:
    """The control group hierarchies of this host. `version` is 1 on pure and on hybrid hosts."""

    version: int
    mounts: Mapping[str, Path]
    """Version 1: controller -> mount point. Version 2: the key is `unified`."""
    others: tuple[Path, ...] = ()
    """Version 1: hierarchies without any of our controllers."""

    @classmethod
    def detect(cls, mounts: Iterable[Mount] | None = None) -> "CgroupTree":
        """What this host has. Raises OSError when no hierarchy is mounted.

        A hybrid host, whose version 2 side carries none of our controllers, counts as version 1.
        """
        unified: Path | None = None
        others: list[Path] = []
        by_controller: dict[str, Path] = {}
        for mount in all_mounts() if mounts is None else mounts:
            if mount.fstype == "cgroup":
                ours = mount.super_options.intersection(CONTROLLERS_V1)
                for name in ours:
                    by_controller.setdefault(name, Path(mount.target))
                if not ours:
                    others.append(Path(mount.target))
            elif mount.fstype == "cgroup2" and unified is None:
                unified = Path(mount.target)
        if by_controller:
            return cls(
                1, {name: by_controller[name] for name in CONTROLLERS_V1 if name in by_controller}, tuple(others)
            )
        if unified is None:
            raise OSError(errno.ENOENT, "no control group file system is mounted")
        return cls(2, {"unified": unified})

    def missing(self) -> list[str]:
        """The controllers we want and this host does not offer."""
        if self.version == 1:
            return [name for name in CONTROLLERS_V1 if name not in self.mounts]
        offered = _read(self.mounts["unified"] / "cgroup.controllers").split()
        return [name for name in CONTROLLERS_V2 if name not in offered]

    def server_root(self, name: str) -> Group:
        """The group that holds all groups of one server; makes nothing.

        Directly below the top, or on version 2 in the subtree that systemd gave away for guests, where the unit that asks for it is installed: what
        is not delegated is systemd's to write. A group that is already at the top stays in use, because its guests cannot be moved.
        """
        if self.version == 2:
            top = self.mounts["unified"]
            if (top / DELEGATED / "cgroup.controllers").exists() and not (top / name).is_dir():
                return self.group(f"{DELEGATED}/{name}")
        return self.group(name)

    def group(self, path: str) -> Group:
        """The group at `path`, as in an OCI specification's `cgroupsPath`; makes nothing."""
        return GroupV1(self.mounts, path, self.others) if self.version == 1 else GroupV2(self.mounts["unified"], path)


def quota_us(cores: float) -> int:
    """Microseconds of processor time in each CPU_PERIOD_US; the kernel takes no less than a millisecond."""
    return max(1000, round(cores * CPU_PERIOD_US))


def flat_value(text: str, key: str) -> int:
    """The number after `key` in a flat-keyed control file; 0 when it is not there."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _tree(top: Path) -> Iterator[Path]:
    """`top` and every directory below it, parents first."""
    for path, _, _ in os.walk(top):
        yield Path(path)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # gone, or a controller that is not there
        return ""


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
