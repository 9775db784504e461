"""Every setting: its environment variable (`INNKEEPER_` + upper case), default and meaning. Validated at start; unknown names are refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "INNKEEPER_"

# Variables with the prefix that are not settings of the server: the command line and the tests read them.
NOT_SETTINGS = frozenset({"INNKEEPER_URL", "INNKEEPER_TOKEN", "INNKEEPER_TEST_CACHE"})


class Settings(BaseSettings):
    """The settings of one server."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    home: Annotated[Path, Field(description="State directory. Several servers run side by side with one each.")] = Path(
        "/var/lib/innkeeper"
    )
    listen: Annotated[str, Field(description="Address of the HTTP API.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535, description="Port of the HTTP API.")] = 7070
    insecure: Annotated[
        bool, Field(description="Allow a listen address that is not loopback although the server speaks plain HTTP.")
    ] = False
    api_user: Annotated[str, Field(description="System user that the API process runs as.")] = "innkeeper"
    database_url: Annotated[
        str | None, Field(description="SQLAlchemy URL; default: SQLite in the state directory.")
    ] = None
    master_key: Annotated[
        SecretStr | None,
        Field(
            description="Base64 of the 32-byte key that encrypts secrets at rest; default: a key file in the state directory."
        ),
    ] = None
    images: Annotated[str, Field(description="Comma-separated shipped images to build at start.")] = (
        "base,python-data-science,node"
    )
    images_dir: Annotated[
        Path | None, Field(description="Recipes of the shipped images; default: the ones that came with the server.")
    ] = None
    agent_binary: Annotated[
        Path | None, Field(description="The guest agent; default: the one that came with the server.")
    ] = None
    runsc: Annotated[str, Field(description="The runsc binary, a path or a name in PATH.")] = "runsc"
    runsc_platform: Annotated[
        Literal["auto", "systrap", "ptrace", "kvm"],
        Field(description="gVisor platform; auto measures the two that work everywhere once and takes the faster."),
    ] = "auto"
    room_wait_seconds: Annotated[
        float,
        Field(gt=0, le=600, description="How long a request waits for a room to become ready before it answers 503."),
    ] = 30
    default_command_timeout_seconds: Annotated[
        int, Field(ge=1, le=3600, description="Time limit of a command where neither profile nor request says one.")
    ] = 120
    freeze_after_seconds: Annotated[
        float,
        Field(ge=0.05, le=3600, description="A guest that was idle this long, with no process of its user, is frozen."),
    ] = 2.0
    memory_overcommit: Annotated[
        float,
        Field(
            ge=0.1,
            le=16,
            description="Sum of the guests' memory may be this multiple of the RAM (frozen guests count a quarter).",
        ),
    ] = 2.0
    memory_reserve_mb: Annotated[int, Field(ge=0, description="RAM kept for the host.")] = 1024
    disk_reserve_mb: Annotated[int, Field(ge=0, description="Free disk under which no new guests are made.")] = 2048
    pool_disk_mb: Annotated[
        int | None,
        Field(
            ge=1024,
            description="Size of the sparse XFS that holds disks where the state directory cannot reflink; default: 90 % of the free space.",
        ),
    ] = None
    max_starts: Annotated[int, Field(ge=1, le=64, description="Cold starts at the same time.")] = max(
        2, os.cpu_count() or 2
    )
    max_execs: Annotated[
        int | None,
        Field(
            ge=1,
            description="Commands that are being started at the same time on the host; more wait their turn. Default: 4 per CPU.",
        ),
    ] = None
    allowed_cidrs: Annotated[
        str, Field(description="Comma-separated networks that guests may reach although they are private or special.")
    ] = ""
    dns_upstreams: Annotated[
        str,
        Field(description="Comma-separated DNS servers (address or address:port); default: the host's resolv.conf."),
    ] = ""
    host_netns: Annotated[
        str, Field(description="Path of the network namespace that stands for the host; default: the daemon's own.")
    ] = ""
    keep_machines: Annotated[
        bool, Field(description="Guests run on when the server ends, and the next start adopts them; false stops them.")
    ] = True
    public_files_per_minute: Annotated[
        int, Field(ge=1, description="Requests for public files per client address and minute.")
    ] = 600
    log_format: Annotated[Literal["console", "json"], Field(description="Form of the log lines.")] = "console"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Least severe level that is logged.")
    ] = "info"

    @property
    def server_id(self) -> str:
        """8 hex digits that name everything global of this server (namespaces, cgroups, tables): a digest of the state directory's path."""
        return hashlib.sha256(os.fsencode(self.home.resolve())).hexdigest()[:8]

    @property
    def host_dir(self) -> Path:
        """The root daemon's directory."""
        return self.home / "host"

    @property
    def api_dir(self) -> Path:
        """The API process's directory."""
        return self.home / "api"


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, then `overrides` that are not None.

    Raises:
        ValueError: a bad value or an unknown `INNKEEPER_` variable, naming it.

    """
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | NOT_SETTINGS
    unknown = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)
    if unknown:
        raise ValueError(f"unknown setting: {', '.join(unknown)}")
    return Settings(**{name: value for name, value in overrides.items() if value is not None})  # type: ignore[arg-type]
