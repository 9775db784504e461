"""Where the daemon keeps what."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from innkeeper.errors import InstanceFailedError
from innkeeper.host.exhaustion import unavailable

INSTANCE_RECORD = "instance.json"
# See `machine.FORMAT`: the same rules.
INSTANCE_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Directories:
    """Where the daemon keeps things of machines, below its own directory."""

    host: Path

    @property
    def machines(self) -> Path:
        """One folder per machine: record, bundle, link."""
        return self.host / "machines"

    @property
    def mounts(self) -> Path:
        """One folder per machine: its disk and its root file system."""
        return self.host / "mounts" / "machines"

    @property
    def hubs(self) -> Path:
        """One folder per sandbox, with its volumes mounted in it."""
        return self.host / "mounts" / "volumes"

    @property
    def runsc(self) -> Path:
        """The state of runsc."""
        return self.host / "runsc"

    @property
    def microvms(self) -> Path:
        """What QEMU's jails are made of."""
        return self.host / "microvms"

    @property
    def instances(self) -> Path:
        """One folder per instance: record and journals."""
        return self.host / "instances"

    @property
    def logs(self) -> Path:
        """One folder per instance: its log, which outlives a start that failed."""
        return self.host / "instance-logs"

    @property
    def changes(self) -> Path:
        """One folder per instance, owned by the scanner."""
        return self.host / "changes"

    @property
    def usage(self) -> Path:
        """What machines that have ended used, until it is counted."""
        return self.host / "usage"

    @property
    def trash(self) -> Path:
        """What is being removed: emptied at every start."""
        return self.host / "trash"

    def disk_of(self, instance_id: UUID) -> str | None:
        """The name of the instance's disk, or None when it has none here."""
        return self._recorded(instance_id, "disk")

    def hostname_of(self, instance_id: UUID) -> str | None:
        """The instance's host name, or None before its first machine."""
        return self._recorded(instance_id, "hostname")

    def image_of(self, instance_id: UUID) -> str | None:
        """The digest of the image that the instance's disk stands on."""
        return self._recorded(instance_id, "image_digest")

    def instance_ids(self) -> list[UUID]:
        """Instances that have a record here."""
        found = []
        for entry in self.instances.iterdir():
            with contextlib.suppress(ValueError):
                found.append(UUID(entry.name))
        return found

    def owned_disks(self) -> set[str]:
        """Names of the disks that instances own. Raises InstanceFailedError when a record cannot be read."""
        return {disk for instance_id in self.instance_ids() if (disk := self.disk_of(instance_id)) is not None}

    def _recorded(self, instance_id: UUID, field: str) -> str | None:
        """A field of the instance's record, or None where there is no record.

        Raises InstanceFailedError for one that cannot be read: to take it for none would be to take its disk for nobody's. UnavailableError, which that
        is too, where the host has run out of something.
        """
        try:
            body = json.loads((self.instances / str(instance_id) / INSTANCE_RECORD).read_text())
            if body.get("format", INSTANCE_FORMAT) > INSTANCE_FORMAT:
                raise InstanceFailedError("The instance's record is of a newer version of the server")
            return str(body[field])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            exhausted = unavailable(error) if isinstance(error, OSError) else None
            raise exhausted or InstanceFailedError("The instance's record cannot be read") from error

    def make(self) -> None:
        """Make them all, root's alone."""
        for path in (
            self.machines,
            self.mounts,
            self.runsc,
            self.microvms,
            self.instances,
            self.logs,
            self.usage,
            self.trash,
        ):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The scanner, another user, may pass through, and only into folders that are its own.
        self.changes.mkdir(mode=0o711, exist_ok=True)
