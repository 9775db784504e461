"""File systems: loop devices, ext4 with overlay on it, EROFS, reflinks; each really mounted and read.

The work runs as a program of its own in a private mount namespace: however it ends, the kernel takes its mounts and loop
devices away with it. `python -m innkeeper.host.probes.filesystems DIRECTORY` prints one JSON object.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from innkeeper.host.disks.rootfs import OVERLAY_FEATURES
from innkeeper.host.linux import command, loop_device, mounts
from innkeeper.host.linux.hold import held_folder
from innkeeper.host.probes.check import Check, Findings

FICLONE = 0x40049409
IMAGE_BYTES = 16 << 20
# mkfs.xfs refuses less than 300 MB; sparse, so it costs a few.
XFS_BYTES = 512 << 20
WITNESS = "innkeeper was here"

FIXES = {
    "loop devices": "modprobe loop",
    "overlay": "modprobe -a overlay ext4",
    "erofs": "apt-get install -y erofs-utils && modprobe erofs",
    "reflink": "apt-get install -y xfsprogs && modprobe xfs",
}


async def probe_filesystems(state: Path) -> Findings:
    """Try everything in a temporary directory below `state`, which must exist."""
    missing = [
        tool
        for tool in ("mkfs.ext4", "unshare")
        if shutil.which(tool, path=command.MINIMAL_ENVIRONMENT["PATH"]) is None
    ]
    if missing:
        fix = "apt-get install -y e2fsprogs util-linux"
        return Findings((Check("loop devices", False, f"{', '.join(missing)} is not installed", fix, required=True),))
    with held_folder(state, ".inn-probe-") as directory:
        argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-I", "-m", __name__, str(directory)]
        try:
            answer = await command.run(argv, timeout_seconds=30)
            found: dict[str, dict[str, Any]] = json.loads(answer.stdout)
        except (command.CommandFailed, ValueError) as error:
            reason = error.stderr_tail[-300:] if isinstance(error, command.CommandFailed) else "unreadable answer"
            return Findings(
                (Check("loop devices", False, f"cannot be tried: {reason}", FIXES["loop devices"], required=True),)
            )
    checks = tuple(
        Check(name, bool(one["ok"]), str(one["detail"]), None if one["ok"] else FIXES[name], required=True)
        for name, one in found.items()
    )
    return Findings(checks, {"state_reflinks": bool(found.get("reflink", {}).get("here", False))})


async def _try_all(directory: Path) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[Path], Awaitable[dict[str, Any]]]] = {
        "loop devices": _try_loop,
        "overlay": _try_overlay,
        "erofs": _try_erofs,
        "reflink": _try_reflink,
    }
    for name, step in steps.items():
        try:
            results[name] = {"ok": True, **await step(directory)}
        except command.CommandFailed as error:
            results[name] = {"ok": False, "detail": (error.stderr_tail.splitlines() or [error.reason])[-1]}
        except OSError as error:
            results[name] = {"ok": False, "detail": str(error)}
    return results


async def _try_loop(directory: Path) -> dict[str, Any]:
    image = _sparse(directory / "ext4.img", IMAGE_BYTES)
    await command.run(["mkfs.ext4", "-q", "-F", str(image)])
    with loop_device.attach(image) as device:
        (directory / "disk").mkdir()
        mounts.mount(device.path, directory / "disk", "ext4", mounts.MS_NODEV)
    return {"detail": "attach, mount and detach"}


async def _try_overlay(directory: Path) -> dict[str, Any]:
    lower, disk = directory / "lower", directory / "disk"
    lower.mkdir()
    (lower / "kept").write_text(WITNESS)
    (lower / "gone").write_text(WITNESS)
    for name in ("upper", "work"):
        (disk / name).mkdir()
    merged = directory / "merged"
    merged.mkdir()
    features = ",".join(OVERLAY_FEATURES)
    options = f"lowerdir={lower},upperdir={disk}/upper,workdir={disk}/work,{features}"
    mounts.mount("overlay", merged, "overlay", mounts.MS_NODEV, options)
    (merged / "kept").write_text(WITNESS)
    (merged / "gone").unlink()
    if not (disk / "upper/kept").is_file() or not (disk / "upper/gone").is_char_device():
        raise OSError("an overlay on a loop-mounted ext4 does not show its changes")
    return {"detail": "mounts on a loop-mounted ext4 and shows its changes"}


async def _try_erofs(directory: Path) -> dict[str, Any]:
    tree, image, target = directory / "tree", directory / "image.erofs", directory / "erofs"
    tree.mkdir()
    target.mkdir()
    (tree / "witness").write_text(WITNESS)
    await command.run(["mkfs.erofs", str(image), str(tree)])
    with loop_device.attach(image, read_only=True) as device:
        mounts.mount(device.path, target, "erofs", mounts.MS_RDONLY | mounts.MS_NODEV)
    if (target / "witness").read_text() != WITNESS:
        raise OSError("an EROFS image does not give back what was put into it")
    return {"detail": "mkfs.erofs and the kernel agree"}


async def _try_reflink(directory: Path) -> dict[str, Any]:
    if _clones(directory):
        return {"detail": "the state directory clones files", "here": True}
    image, target = _sparse(directory / "xfs.img", XFS_BYTES), directory / "xfs"
    target.mkdir()
    await command.run(["mkfs.xfs", "-q", "-K", "-m", "reflink=1", str(image)])
    with loop_device.attach(image) as device:
        mounts.mount(device.path, target, "xfs", mounts.MS_NODEV)
    if not _clones(target):
        raise OSError("a loop-mounted XFS does not clone files")
    return {"detail": "not in the state directory; a loop-mounted XFS does it", "here": False}


def _clones(directory: Path) -> bool:
    (directory / "source").write_bytes(b"x" * 65_536)
    with (directory / "source").open("rb") as source, (directory / "clone").open("wb") as clone:
        try:
            fcntl.ioctl(clone, FICLONE, source.fileno())
        except OSError:
            return False
    return True


def _sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    json.dump(asyncio.run(_try_all(Path(sys.argv[1]))), sys.stdout)
