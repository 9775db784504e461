"""That a machine has a volume, as its daemon and the next one know it: a file in the machine's folder, which goes with the machine."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

FOLDER = "volumes"
# Beside it once everything was done: a daemon that finds an attachment without was killed in the midst of attaching or detaching it.
READY = ".ready"


@dataclass(frozen=True, slots=True)
class Attachment:
    """A volume at a path of a guest; not `ready` while it comes or goes."""

    volume_id: UUID
    path: str
    read_only: bool
    ready: bool = False

    def save(self, state_dir: Path) -> None:
        """Write that the machine may have it from now on, or has it, being `ready`."""
        folder = state_dir / FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        mark = folder / f"{self.volume_id}{READY}"
        if self.ready:
            mark.touch()
            return
        mark.unlink(missing_ok=True)
        record = folder / f"{self.volume_id}.json"
        if not record.exists():
            fresh = record.with_suffix(".new")
            fresh.write_text(json.dumps({"path": self.path, "read_only": self.read_only}))
            fresh.rename(record)

    def forget(self, state_dir: Path) -> None:
        """Write that the machine has it no more."""
        for suffix in (READY, ".json"):
            (state_dir / FOLDER / f"{self.volume_id}{suffix}").unlink(missing_ok=True)


def load_attachments(state_dir: Path) -> dict[UUID, Attachment]:
    """Those of a machine, by volume."""
    found = {}
    for record in (state_dir / FOLDER).glob("*.json"):
        # Written whole, by root alone: one that cannot be read is of a version that knew more.
        with contextlib.suppress(ValueError, KeyError, FileNotFoundError):
            body = json.loads(record.read_text())
            volume_id = UUID(record.stem)
            ready = record.with_suffix(READY).exists()
            found[volume_id] = Attachment(volume_id, str(body["path"]), body["read_only"] is True, ready)
    return found
