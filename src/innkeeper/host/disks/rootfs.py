"""A guest's root filesystem: read-only image layers below, the instance's own ext4 disk above, joined by an overlay."""

# ruff: noqa: ASYNC240  # a rename or mkdir on a local disk takes microseconds, a hop to a thread takes longer

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.linux import loop_device, mounts
from innkeeper.host.linux.freeze import thaw

# Everything a guest writes lands on the host's file systems with the owner and mode the guest gave it: neither a device
# node nor a set-uid program from there may mean anything on the host.
DISK_FLAGS = mounts.MS_NODEV | mounts.MS_NOSUID | mounts.MS_NOATIME
OVERLAY_FLAGS = mounts.MS_NODEV | mounts.MS_NOSUID | mounts.MS_NOATIME
# The change scan compares whole files of the upper with the layers below: no metadata-only copies, no redirects.
# userxattr: overlay's own marks lie in user.overlay.*, which the scanner can read without CAP_SYS_ADMIN; a guest cannot forge
# them, since gVisor gives its root file system no user attributes.
OVERLAY_FEATURES = ("metacopy=off", "redirect_dir=nofollow", "index=off", "userxattr")
DISK_OPTIONS = "commit=30"
MAX_LAYERS = 20
MAX_OPTION_BYTES = 4095  # of mount(2): one page


@dataclass(frozen=True, slots=True)
class OverlayPlan:
    """One overlay mount. `lowers` has the uppermost layer first."""

    lowers: tuple[Path, ...]
    upper: Path
    work: Path
    target: Path

    def options(self) -> str:
        """The mount data. Raises ValueError for too many or too long layers, before anything is mounted."""
        if not 1 <= len(self.lowers) <= MAX_LAYERS:
            raise ValueError(f"{len(self.lowers)} layers; 1 to {MAX_LAYERS} can be stacked")
        lowerdir = ":".join(_escape(lower) for lower in self.lowers)
        data = ",".join(
            (
                f"lowerdir={lowerdir}",
                f"upperdir={_escape(self.upper)}",
                f"workdir={_escape(self.work)}",
                *OVERLAY_FEATURES,
            )
        )
        if len(os.fsencode(data)) > MAX_OPTION_BYTES:
            raise ValueError(
                f"the paths of {len(self.lowers)} layers exceed the {MAX_OPTION_BYTES} bytes of mount options"
            )
        return data

    def describe(self) -> str:
        """The plan as a command line that does the same."""
        return f"mount -t overlay -o nodev,nosuid,noatime,{self.options()} overlay {self.target}"


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What a guest's root is made of: disk `name` of `size_mib` (kept as it is where it exists), layers, and where to mount.

    The overlay appears at `<mount_directory>/root`, the disk at `<mount_directory>/disk`.
    """

    name: str
    size_mib: int
    lowers: tuple[Path, ...]
    mount_directory: Path
    # Another disk, of the same size, of which a new one begins as a copy.
    copy_of: Path | None = None

    @property
    def overlay(self) -> OverlayPlan:
        """The overlay that the plan ends in."""
        disk = self.mount_directory / "disk"
        return OverlayPlan(self.lowers, disk / "u", disk / "w", self.mount_directory / "root")


@dataclass(frozen=True, slots=True)
class InstanceDisk:
    """A mounted root: `root` for the driver, `upper` for the change scan. `steps_ms` says what making it cost."""

    root: Path
    upper: Path
    disk: Path
    created: bool
    adopted: bool
    steps_ms: dict[str, float] = field(default_factory=dict)


async def mount_root(pool: DiskPool, plan: DiskPlan) -> InstanceDisk:
    """Make, or find, the disk of an instance and mount its root; `release` unmounts it, and the disk stays.

    A disk that was created here is removed again when mounting fails, so a start that failed leaves nothing. What a
    former daemon left mounted is taken over as it is. Raises ValueError (plan), OSError, CommandFailed.

    Not a context manager: a guest outlives the daemon, and a generator's cleanup would run when the interpreter ends.
    """
    options = plan.overlay.options()
    adopted = mounts.is_mounted(plan.overlay.target)
    created = False
    steps: dict[str, float] = {}
    try:
        if not adopted:
            with _stamped(steps, "copy"):
                created = await pool.create_disk(plan.name, plan.size_mib, copy_of=plan.copy_of)
            fresh = created and plan.copy_of is None
            await _mount_disk(pool.disk_path(plan.name), plan.mount_directory / "disk", steps, created=fresh)
            with _stamped(steps, "overlay"):
                for directory in (plan.overlay.upper, plan.overlay.work, plan.overlay.target):
                    directory.mkdir(exist_ok=True, mode=0o755)
                mounts.mount("overlay", plan.overlay.target, "overlay", OVERLAY_FLAGS, options)
    except BaseException:
        await asyncio.shield(_discard(pool, plan) if created else release(plan.mount_directory))
        raise
    return InstanceDisk(
        root=plan.overlay.target,
        upper=plan.overlay.upper,
        disk=plan.mount_directory / "disk",
        created=created,
        adopted=adopted,
        steps_ms=steps,
    )


async def find_disk(pool: DiskPool, plan: DiskPlan) -> Path:
    """The file of the disk, made where it is not there yet, for a guest that mounts it itself. Nobody else has it open. Raises OSError."""
    path = pool.disk_path(plan.name)
    if not await pool.create_disk(plan.name, plan.size_mib, copy_of=plan.copy_of):
        await loop_device.wait_unused(path)
    return path


async def release(mount_directory: Path) -> None:
    """Unmount root and disk of a guest and remove the mount points; whatever is gone already is fine."""
    thaw(mount_directory / "disk")
    for name in ("root", "disk"):
        target = mount_directory / name
        try:
            while await mounts.umount(target, mounts.UMOUNT_NOFOLLOW):
                pass
        except OSError:
            # Busy: a process of the guest is still dying. The mount goes from sight now, and for good with it.
            await mounts.umount(target, mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
    with contextlib.suppress(FileNotFoundError):
        mount_directory.rmdir()


async def _discard(pool: DiskPool, plan: DiskPlan) -> None:
    await release(plan.mount_directory)
    await pool.remove_disk(plan.name)


async def _mount_disk(image: Path, target: Path, steps: dict[str, float], *, created: bool) -> None:
    target.mkdir(parents=True, exist_ok=True, mode=0o700)
    if mounts.is_mounted(target):
        return
    if not created:
        # ext4 that is mounted twice through two devices loses what is written.
        await loop_device.wait_unused(image)
    with _stamped(steps, "attach"):
        device = loop_device.attach(image)
    with device, _stamped(steps, "mount"):
        if created:
            mounts.mount(device.path, target, "ext4", DISK_FLAGS, DISK_OPTIONS)
        else:
            # In a thread: a disk that was not unmounted replays its journal first.
            await asyncio.to_thread(mounts.mount, device.path, target, "ext4", DISK_FLAGS, DISK_OPTIONS)


@contextlib.contextmanager
def _stamped(steps: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    steps[name] = round((time.monotonic() - started) * 1000, 2)


def _escape(path: Path) -> str:
    # In overlay's options a colon ends a layer and a comma an option.
    return "".join("\\" + char if char in "\\:," else char for char in os.fspath(path))
