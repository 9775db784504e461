"""Volumes of microVMs: SCSI disks that are plugged in and out while the guest runs. QEMU gets each as a descriptor, under the volume's name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from pathlib import Path
from typing import Any

from innkeeper.errors import VolumeFailedError
from innkeeper.host.drivers.contract import VolumeDisk
from innkeeper.host.drivers.qmp import Event, Qmp, QmpError, QmpRefusedError
from innkeeper.host.linux import guest_written

BUS = "scsi0.0"
# QEMU takes a disk out at once; on a busy host its answer was seen to take a second.
UNPLUG_SECONDS = 20.0
UNPLUGGED = "DEVICE_DELETED"
# In /proc/PID/limits.
FILE_SIZE = "Max file size"


class Unplugged:
    """Hears on a session which devices have gone."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Event] = {}

    def expect(self, device: str) -> asyncio.Event:
        """Set when that device has gone."""
        return self._waiting.setdefault(device, asyncio.Event())

    def hear(self, event: Event) -> None:
        """An event of the session."""
        device = event.data.get("device")
        if event.name == UNPLUGGED and isinstance(device, str) and device in self._waiting:
            self._waiting[device].set()


async def plug_in(session: Qmp, pid: int, volume: VolumeDisk) -> None:
    """Give the guest the volume's disk, which has its name as serial number; nothing for one that it has.

    Raises VolumeFailedError (QEMU may write no file of that size), QmpError, OSError.
    """
    if await _is_plugged_in(session, volume):
        return
    # What an attempt that was cut short has left.
    await _forget(session, volume)
    descriptor = os.open(volume.image, (os.O_RDONLY if volume.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not volume.read_only:
            # Before anything of the guest's can be in it.
            guest_written.mark(descriptor)
            _let_write(pid, os.fstat(descriptor).st_size)
        answer = await session.execute("add-fd", {"opaque": volume.name}, descriptor=descriptor)
    finally:
        os.close(descriptor)
    try:
        await session.execute("blockdev-add", _node(volume, _number(answer)))
        await session.execute(
            "device_add",
            {"driver": "scsi-hd", "bus": BUS, "id": _device(volume), "drive": _device(volume), "serial": volume.name},
        )
    except BaseException:
        await asyncio.shield(_forget(session, volume))
        raise


async def pull_out(session: Qmp, unplugged: Unplugged, volume: VolumeDisk) -> None:
    """Take the disk away, whatever the guest does with it; on return QEMU has closed its file. Fine for one that is not there.

    Raises VolumeFailedError when it stays, QmpError.
    """
    if await _is_plugged_in(session, volume):
        gone = unplugged.expect(_device(volume))
        with contextlib.suppress(QmpRefusedError):
            # Refused: it is on its way out already.
            await session.execute("device_del", {"id": _device(volume)})
        try:
            async with asyncio.timeout(UNPLUG_SECONDS):
                await gone.wait()
        except TimeoutError:
            if await _is_plugged_in(session, volume):
                raise VolumeFailedError("The virtual machine does not let go of the volume") from None
    await _forget(session, volume)


async def _forget(session: Qmp, volume: VolumeDisk) -> None:
    """Have QEMU close the volume's file, where no disk is made of it any more."""
    nodes = _objects(await session.execute("query-named-block-nodes", {"flat": True}))
    if any(node.get("node-name") == _device(volume) for node in nodes):
        await session.execute("blockdev-del", {"node-name": _device(volume)})
    for found in _objects(await session.execute("query-fdsets")):
        if any(one.get("opaque") == volume.name for one in _objects(found.get("fds"))):
            with contextlib.suppress(QmpRefusedError):
                # Refused: it went with its last user.
                await session.execute("remove-fd", {"fdset-id": _number(found)})


async def _is_plugged_in(session: Qmp, volume: VolumeDisk) -> bool:
    found = _objects(await session.execute("qom-list", {"path": "/machine/peripheral"}))
    return any(one.get("name") == _device(volume) for one in found)


def _objects(answer: object) -> list[dict[str, Any]]:
    if not isinstance(answer, list) or not all(isinstance(one, dict) for one in answer):
        raise QmpError("QEMU's control socket gave an answer of another form")
    return answer


def _number(answer: object) -> int:
    number = answer.get("fdset-id") if isinstance(answer, dict) else None
    if type(number) is not int:
        raise QmpError("QEMU's control socket gave an answer of another form")
    return number


def _device(volume: VolumeDisk) -> str:
    # Names begin with a letter.
    return f"volume-{volume.name[:20]}"


def _node(volume: VolumeDisk, number: int) -> dict[str, Any]:
    node: dict[str, Any] = {
        "driver": "raw",
        "node-name": _device(volume),
        "read-only": volume.read_only,
        "file": {"driver": "file", "filename": f"/dev/fdset/{number}"},
    }
    if volume.read_only:
        # Shared by those who read it: no lock, which the second one would not get.
        node["file"]["locking"] = "off"
        return node
    return {**node, "discard": "unmap", "detect-zeroes": "unmap"}


def _let_write(pid: int, size_bytes: int) -> None:
    """Let QEMU write files as large as the volume: at its start the largest was the guest's disk, so that one that was taken over cannot fill the host's."""
    # Not by prlimit(2): to look already takes the right to change.
    known = next(
        line for line in Path("/proc", str(pid), "limits").read_text().splitlines() if line.startswith(FILE_SIZE)
    )
    soft = known.removeprefix(FILE_SIZE).split()[0]
    if not soft.isdigit() or int(soft) >= size_bytes:
        return
    try:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, size_bytes))
    except PermissionError:
        raise VolumeFailedError(
            "The volume is larger than the instance's disk, and the server lacks the right to let a running machine write it (CAP_SYS_RESOURCE)"
        ) from None
