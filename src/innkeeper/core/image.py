"""The image: a read-only root filesystem with its defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class ImageStatus(StrEnum):
    """Where an image is on its way to being usable."""

    MISSING = "missing"
    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Image:
    """A root filesystem as a host reports it. `tools` names what a command can use, for tool descriptions; digest is "" until it is ready."""

    name: str
    status: ImageStatus
    digest: str = ""
    size_bytes: int = 0
    user: str = "root"
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    built_at: str | None = None
    message: str | None = None
