"""The volumes of a scripted host: rows in a dict, and errors where a test sets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from uuid import UUID

from innkeeper.bus.contract import ServerCall
from innkeeper.core import volume_verbs as verbs
from innkeeper.errors import InnkeeperError, InstanceNotFoundError, VolumeInUseError, VolumeNotFoundError

USED_BYTES = 7_000
OWN_BYTES = 3_000


class ScriptedVolumes:
    """Answers to volume verbs. An error is raised by the next verb of its kind and all after it."""

    def __init__(self, machines: dict[UUID, dict[str, Any]]) -> None:
        self._machines = machines
        self.kept: dict[UUID, dict[str, Any]] = {}
        self.attached: dict[tuple[UUID, UUID], tuple[str, bool]] = {}
        self.create_error: InnkeeperError | None = None
        self.remove_error: InnkeeperError | None = None
        self.attach_error: InnkeeperError | None = None
        self.detach_error: InnkeeperError | None = None

    def answers(self) -> Iterable[tuple[type[Any], Callable[[Any, ServerCall], Any]]]:
        return (
            (verbs.CreateVolume, self._create),
            (verbs.GrowVolume, self._grow),
            (verbs.RemoveVolume, self._remove),
            (verbs.AttachVolume, self._attach),
            (verbs.DetachVolume, self._detach),
            (verbs.ListVolumes, self._list),
        )

    async def _create(self, request: verbs.CreateVolume, call: ServerCall) -> dict[str, Any]:
        if self.create_error is not None:
            raise self.create_error
        self.kept[request.volume_id] = {
            "volume_id": str(request.volume_id),
            "size_mb": request.size_mb,
            "used_bytes": USED_BYTES,
            "own_bytes": OWN_BYTES,
            "guest_written": False,
            "immutable": request.immutable,
        }
        return self.kept[request.volume_id]

    async def _grow(self, request: verbs.GrowVolume, call: ServerCall) -> dict[str, Any]:
        self._get(request.volume_id)["size_mb"] = request.size_mb
        return self._get(request.volume_id)

    async def _remove(self, request: verbs.RemoveVolume, call: ServerCall) -> dict[str, Any]:
        if self.remove_error is not None:
            raise self.remove_error
        if any(volume == request.volume_id for _, volume in self.attached):
            raise VolumeInUseError
        self.kept.pop(request.volume_id, None)
        return {}

    async def _attach(self, request: verbs.AttachVolume, call: ServerCall) -> dict[str, Any]:
        if self.attach_error is not None:
            raise self.attach_error
        self._get(request.volume_id)
        if request.instance_id not in self._machines:
            raise InstanceNotFoundError
        self.attached[request.instance_id, request.volume_id] = (request.path, request.read_only)
        return {}

    async def _detach(self, request: verbs.DetachVolume, call: ServerCall) -> dict[str, Any]:
        if self.detach_error is not None:
            raise self.detach_error
        self.attached.pop((request.instance_id, request.volume_id), None)
        return {}

    async def _list(self, request: verbs.ListVolumes, call: ServerCall) -> dict[str, Any]:
        # A machine that is gone has nothing.
        self.attached = {key: value for key, value in self.attached.items() if key[0] in self._machines}
        return {
            "volumes": [
                {
                    **one,
                    "attached": [
                        {"instance_id": str(instance), "path": path, "read_only": read_only, "ready": True}
                        for (instance, volume), (path, read_only) in self.attached.items()
                        if volume == volume_id
                    ],
                }
                for volume_id, one in self.kept.items()
                if request.volume_ids is None or volume_id in request.volume_ids
            ]
        }

    def _get(self, volume_id: UUID) -> dict[str, Any]:
        try:
            return self.kept[volume_id]
        except KeyError:
            raise VolumeNotFoundError from None
