"""The profile: a template that rooms are made from, and its limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from innkeeper.core.egress_policy import EgressPolicy
from innkeeper.core.image import validate_image_name
from innkeeper.core.isolation import Wish
from innkeeper.errors import InvalidRequestError

NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
USER_PATTERN = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
ENV_NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PUBLIC_FILES = ("reported", "all", "off")

VCPU_RANGE = (1, 64)
MEMORY_MB_RANGE = (128, 262_144)
DISK_MB_RANGE = (64, 1_048_576)
WARM_POOL_RANGE = (0, 1_000)
IDLE_SECONDS_RANGE = (60, 31_536_000)
COMMAND_TIMEOUT_RANGE = (1, 3_600)
ENV_BYTES_MAX = 32_768


@dataclass(frozen=True, slots=True)
class Profile:
    """A template: image, size, environment, policies. Only `name` and `image` are required of a user."""

    id: UUID
    organization_id: UUID
    name: str
    image: str
    created_at: datetime
    vcpu_count: int = 2
    memory_mb: int = 1024
    disk_mb: int = 10_240
    env: dict[str, str] = field(default_factory=dict, repr=False)
    user: str | None = None
    workdir: str | None = None
    egress_policy: EgressPolicy = field(default_factory=EgressPolicy)
    driver: str = "auto"
    min_isolation: str = "gvisor"
    warm_pool_size: int = 2
    idle_seconds: int | None = 86_400
    command_timeout_seconds: int = 120
    public_files: str = "reported"
    revision: int = 0


def validate_profile(profile: Profile) -> None:
    """Check every limit of a profile.

    Raises:
        InvalidRequestError: naming the field and its limit.

    """
    if not NAME_PATTERN.fullmatch(profile.name):
        raise InvalidRequestError(
            "name: 1-63 characters of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit"
        )
    validate_image_name(profile.image, "image")
    for name, value, (low, high) in (
        ("vcpu_count", profile.vcpu_count, VCPU_RANGE),
        ("memory_mb", profile.memory_mb, MEMORY_MB_RANGE),
        ("disk_mb", profile.disk_mb, DISK_MB_RANGE),
        ("warm_pool_size", profile.warm_pool_size, WARM_POOL_RANGE),
        ("command_timeout_seconds", profile.command_timeout_seconds, COMMAND_TIMEOUT_RANGE),
    ):
        if not low <= value <= high:
            raise InvalidRequestError(f"{name}: must be between {low} and {high}")
    low, high = IDLE_SECONDS_RANGE
    if profile.idle_seconds is not None and not low <= profile.idle_seconds <= high:
        raise InvalidRequestError(f"idle_seconds: must be null (never) or between {low} and {high}")
    Wish(profile.driver, profile.min_isolation).validate()
    if profile.public_files not in PUBLIC_FILES:
        raise InvalidRequestError(f"public_files: must be one of {', '.join(PUBLIC_FILES)}")
    if profile.user is not None and not USER_PATTERN.fullmatch(profile.user):
        raise InvalidRequestError("user: not a user name")
    if profile.workdir is not None and (
        not profile.workdir.startswith("/") or "\0" in profile.workdir or len(profile.workdir) > 4_096
    ):
        raise InvalidRequestError("workdir: must be an absolute path of at most 4096 characters")
    validate_env(profile.env)


def validate_env(env: dict[str, str], field: str = "env") -> None:
    """Check names and total size of environment variables, which a request has in `field`.

    Raises:
        InvalidRequestError: naming the variable, never its value.

    """
    for name, value in env.items():
        if not ENV_NAME_PATTERN.fullmatch(name):
            raise InvalidRequestError(f"{field}: {name[:64]!r} is not a variable name")
        if "\0" in value:
            raise InvalidRequestError(f"{field}.{name}: must not contain NUL")
    if sum(len(k.encode()) + len(v.encode("utf-8", "surrogatepass")) + 2 for k, v in env.items()) > ENV_BYTES_MAX:
        raise InvalidRequestError(f"{field}: at most {ENV_BYTES_MAX} bytes in all")
