"""A leak: what exists on a host in a server's name and belongs to nothing that lives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class LeakKind(StrEnum):
    """What can be left over. A label of the gauge `innkeeper_leaked_resources`."""

    PROCESS = "process"
    CONTROL_GROUP = "control_group"
    RUNTIME_FILE = "runtime_file"
    MOUNT = "mount"
    LOOP_DEVICE = "loop_device"
    DISK = "disk"
    NETWORK_NAMESPACE = "network_namespace"
    FIREWALL_ELEMENT = "firewall_element"
    FOLDER = "folder"
    TEMPORARY_FILE = "temporary_file"


@dataclass(frozen=True, slots=True, order=True)
class Leak:
    """One leaked resource. `owner` is whom it belonged to: `machine <id>`, `instance <id>`, `slot <number>`, or `server`."""

    kind: LeakKind
    name: str
    owner: str
