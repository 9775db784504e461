"""Audit events: who did what to which object."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

# Every action that is ever written, by what it is about.
CATALOG: dict[str, tuple[str, ...]] = {
    "backup": ("backup.create",),
    "execution": ("execution.start",),
    "file": ("file.copy", "file.mkdir", "file.remove", "file.rename", "file.unpack", "file.write"),
    "host": ("host.draining", "host.gc"),
    "image": ("image.make", "image.remove"),
    "organization": ("organization.create", "organization.limits"),
    "profile": ("profile.create", "profile.delete", "profile.update"),
    "registry": ("registry.login", "registry.logout"),
    "retention": ("retention.change",),
    "room": ("room.create", "room.destroy", "room.expire", "room.machine_lost", "room.restart"),
    "session": ("session.create",),
    "share": ("share.change", "share.create", "share.link", "share.revoke"),
    "snapshot": ("snapshot.create", "snapshot.delete", "snapshot.rename", "snapshot.verify"),
    "ssh": ("ssh.forward", "ssh.login", "ssh.logout", "ssh.session"),
    "ssh_key": ("ssh_key.create", "ssh_key.delete"),
    "terminal": ("terminal.attach", "terminal.create", "terminal.delete"),
    "token": ("token.create", "token.rename", "token.revoke"),
    "vm": (
        "vm.change",
        "vm.create",
        "vm.destroy",
        "vm.expire",
        "vm.hold",
        "vm.kill",
        "vm.machine_lost",
        "vm.restart",
        "vm.resume",
        "vm.stage_env",
        "vm.suspend",
    ),
    "volume": ("volume.attach", "volume.create", "volume.delete", "volume.detach", "volume.grow", "volume.rename"),
    "volume_checkpoint": ("volume_checkpoint.create", "volume_checkpoint.delete"),
}

# Those that tell of something that went wrong.
FAILURES = frozenset({"room.machine_lost", "vm.machine_lost"})


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One line of the audit log. `details` never holds a secret."""

    id: UUID
    organization_id: UUID
    at: datetime
    actor: str
    action: str
    object_type: str
    object_id: str
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which events are wanted: all that fit every field that is not None. `group` is a key of CATALOG; the ids are text as events have them."""

    group: str | None = None
    action: str | None = None
    actor: str | None = None
    failed: bool | None = None
    instance_id: str | None = None
    session_id: str | None = None
