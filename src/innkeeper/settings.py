"""Every setting: its environment variable (`INNKEEPER_` + upper case), default and meaning."""

from __future__ import annotations

import hashlib
import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from innkeeper.settings_file import DEFAULT_HOME
from innkeeper.settings_values import (
    Address,
    CommaSeparated,
    Domain,
    HostName,
    ImageNames,
    ImageVariants,
    MasterKey,
    Networks,
    Registry,
    Servers,
)


class Settings(BaseModel):
    """The settings of one server. Making it by hand reads no environment; `load_settings` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    home: Annotated[Path, Field(description="State directory. Several servers run side by side with one each.")] = (
        DEFAULT_HOME
    )
    listen: Annotated[Address, Field(description="Address of the HTTP API.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535, description="Port of the HTTP API.")] = 7070
    insecure: Annotated[
        bool, Field(description="Allow a listen address that is not loopback although the server speaks plain HTTP.")
    ] = False
    api_user: Annotated[str, Field(description="System user that the API process runs as.")] = "innkeeper"
    database_url: Annotated[
        str | None, Field(description="SQLAlchemy URL; default: SQLite in the state directory.")
    ] = None
    master_key: Annotated[
        MasterKey | None,
        Field(
            description="Base64 of the 32-byte key that encrypts secrets at rest; default: a key file in the state directory."
        ),
    ] = None
    images: Annotated[ImageNames, Field(description="Comma-separated shipped images to build at start.")] = (
        "base,python-data-science,node"
    )
    images_dir: Annotated[
        Path | None, Field(description="Recipes of the shipped images; default: the ones that came with the server.")
    ] = None
    ready_images_dir: Annotated[
        Path | None,
        Field(
            description="Shipped images built elsewhere, taken in place of a build of the same recipe; default: the package innkeeper-images."
        ),
    ] = None
    agent_binary: Annotated[
        Path | None, Field(description="The guest agent; default: the one that came with the server.")
    ] = None
    image_quota_mb: Annotated[
        int,
        Field(
            ge=0,
            description="MiB that the images of one organization may have together; beyond that no new one is begun.",
        ),
    ] = 51_200
    build_vcpus: Annotated[int, Field(ge=1, le=64, description="Processors of a guest that builds an image.")] = 2
    build_memory_mb: Annotated[int, Field(ge=128, description="MiB of memory of a guest that builds an image.")] = 2048
    build_disk_mb: Annotated[int, Field(ge=256, description="MiB of disk of a guest that builds an image.")] = 10_240
    build_timeout_seconds: Annotated[
        int, Field(ge=1, le=86_400, description="Time limit of a whole image build; a single step has at most an hour.")
    ] = 7_200
    build_context_mb: Annotated[
        int, Field(ge=1, description="MiB that the files sent along with an image build may have.")
    ] = 1_024
    build_cache_mb: Annotated[
        int,
        Field(ge=0, description="MiB that kept steps of image builds may take on a host; the least recently used go."),
    ] = 20_480
    image_max_mb: Annotated[int, Field(ge=1, description="MiB that the file of a built image may have.")] = 16_384
    max_builds: Annotated[
        int, Field(ge=1, le=64, description="Image builds at the same time, per organization; more are refused.")
    ] = 2
    import_max_mb: Annotated[
        int, Field(ge=64, le=65_536, description="MiB that an imported image may have, fetched and unpacked each.")
    ] = 8_192
    import_max_files: Annotated[
        int, Field(ge=1, le=10_000_000, description="Files that an imported image may have.")
    ] = 400_000
    import_timeout_seconds: Annotated[
        int, Field(ge=1, le=86_400, description="Time limit of one import of an image.")
    ] = 1_800
    image_registries: Annotated[
        str,
        Field(
            description="Comma-separated hosts (or host:port) and networks that imports may reach although they are private, and may speak to without TLS."
        ),
    ] = ""
    default_registry: Annotated[
        Registry,
        Field(
            description="Registry of images that are named without one, such as python:3.12-slim; default: they are refused."
        ),
    ] = ""
    registry_ca_file: Annotated[
        Path | None,
        Field(
            description="PEM file of certificate authorities that imports trust besides the host's; read anew for each import."
        ),
    ] = None
    vm_image_variants: Annotated[
        ImageVariants,
        Field(
            description="Comma-separated variant=image pairs for VMs; default: `standard` is python-data-science if it is built, else the first image."
        ),
    ] = ""
    vm_vcpus: Annotated[int, Field(ge=1, le=64, description="Processors of a VM that does not ask for others.")] = 2
    vm_memory_mb: Annotated[int, Field(ge=128, description="MiB of memory of a VM that does not ask for others.")] = (
        1024
    )
    vm_disk_mb: Annotated[int, Field(ge=256, description="MiB of disk of a VM.")] = 10_240
    vm_lifetime_seconds: Annotated[
        int, Field(ge=20, description="Lifetime of a VM that does not ask for another, from its creation on.")
    ] = 300
    vm_max_lifetime_seconds: Annotated[int, Field(ge=20, description="Longest lifetime that a VM may ask for.")] = (
        86_400
    )
    max_snapshots: Annotated[int, Field(ge=0, description="Snapshots that an organization may have.")] = 1_000
    snapshot_verify_hours: Annotated[
        int,
        Field(
            ge=0,
            le=8_760,
            description="A snapshot that was not verified for this time is, one after the other; 0: only when it is asked for.",
        ),
    ] = 0
    max_volumes: Annotated[
        int, Field(ge=0, description="Volumes and checkpoints of volumes that an organization may have.")
    ] = 1_000
    max_volume_mb: Annotated[int, Field(ge=64, le=1_048_576, description="Largest quota of a volume, in MiB.")] = (
        102_400
    )
    vm_pool_size: Annotated[
        int,
        Field(ge=0, le=1_000, description="Warm guests that are kept for VMs of the default shape while VMs are used."),
    ] = 2
    runsc: Annotated[str, Field(description="The runsc binary, a path or a name in PATH.")] = "runsc"
    runsc_platform: Annotated[
        Literal["auto", "systrap", "ptrace", "kvm"],
        Field(description="gVisor platform; auto measures the two that work everywhere once and takes the faster."),
    ] = "auto"
    driver: Annotated[
        Literal["auto", "gvisor", "qemu"],
        Field(description="Driver of guests that ask for `auto`; auto takes the strongest that runs here, never TCG."),
    ] = "auto"
    min_isolation: Annotated[
        Literal["none", "gvisor", "microvm"],
        Field(description="No guest is started with a weaker isolation than this, whoever asks for it."),
    ] = "gvisor"
    tcg_counts_as_microvm: Annotated[
        bool,
        Field(
            description="Count a VM without hardware virtualization (QEMU's TCG, no security boundary) as isolation `microvm`, not `none`."
        ),
    ] = False
    room_wait_seconds: Annotated[
        float,
        Field(gt=0, le=600, description="How long a request waits for a room to become ready before it answers 503."),
    ] = 30
    default_command_timeout_seconds: Annotated[
        int, Field(ge=1, le=3600, description="Time limit of a command where neither profile nor request says one.")
    ] = 120
    max_terminals: Annotated[
        int, Field(ge=1, le=256, description="Terminals that may run in one instance at the same time; beyond it 429.")
    ] = 64
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
        Networks,
        Field(description="Comma-separated networks that guests may reach although they are private or special."),
    ] = ""
    dns_upstreams: Annotated[
        Servers,
        Field(
            description="Comma-separated DNS servers (address or address:port) for guests and imports; default: the host's own resolution."
        ),
    ] = ""
    host_netns: Annotated[
        str, Field(description="Path of the network namespace that stands for the host; default: the daemon's own.")
    ] = ""
    keep_machines: Annotated[
        bool, Field(description="Guests run on when the server ends, and the next start adopts them; false stops them.")
    ] = True
    stop_seconds: Annotated[
        float,
        Field(
            ge=0,
            le=3600,
            description="How long requests that are under way may still take when the server is stopped; commands go on without them.",
        ),
    ] = 10
    audit_retention_days: Annotated[
        int,
        Field(ge=1, le=36_500, description="Audit events, and rows of destroyed rooms, are deleted after this time."),
    ] = 90
    price_cpu_hour: Annotated[
        float,
        Field(ge=0, le=1_000_000, description="Dollars for an hour of one processor, shown with an account's usage."),
    ] = 0
    price_memory_gib_hour: Annotated[
        float,
        Field(
            ge=0, le=1_000_000, description="Dollars for a GiB of memory for an hour, shown with an account's usage."
        ),
    ] = 0
    execution_retention_days: Annotated[
        int,
        Field(ge=1, le=36_500, description="Kept output and file changes of commands are deleted after this time."),
    ] = 30
    log_retention_days: Annotated[
        int, Field(ge=1, le=36_500, description="Lines of instances' logs are deleted after this time.")
    ] = 30
    instance_log_mb: Annotated[
        int, Field(ge=1, le=10_240, description="How much is kept of each instance's log; the oldest lines go.")
    ] = 16
    public_files_per_minute: Annotated[
        int, Field(ge=1, description="Requests for public files per client address and minute.")
    ] = 600
    share_domain: Annotated[
        Domain,
        Field(
            description="Shares are host names below this domain (with :port where it is not the usual one); those of localhost need no DNS."
        ),
    ] = "localhost"
    api_hosts: Annotated[
        CommaSeparated,
        Field(description="Comma-separated host names below the share domain that are the API's and never a share's."),
    ] = ""
    share_answer_seconds: Annotated[
        float, Field(gt=0, le=3600, description="How long a guest's server may take to begin its answer; then 504.")
    ] = 60
    share_idle_seconds: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="How long a connection to a guest's port is kept while neither side sends anything.",
        ),
    ] = 600
    port_connections: Annotated[
        int,
        Field(
            ge=1,
            le=512,
            description="Connections to the ports of one instance at the same time; beyond it 429. Each may hold 1.6 MiB.",
        ),
    ] = 64
    max_connections: Annotated[
        int,
        Field(
            ge=16,
            description="HTTP connections at the same time; a further one replaces the one that is idle longest. Each costs about 20 KiB.",
        ),
    ] = 4096
    max_requests_per_organization: Annotated[
        int, Field(ge=1, description="Requests of one organization that are answered at the same time; beyond it 429.")
    ] = 1024
    head_timeout_seconds: Annotated[
        float, Field(gt=0, le=3600, description="How long a client may take for the head of a request.")
    ] = 20
    client_timeout_seconds: Annotated[
        float,
        Field(
            gt=0,
            le=3600,
            description="How long a client may take for a JSON body, between two pieces of an upload, or while it takes nothing of an answer.",
        ),
    ] = 60
    keep_alive_seconds: Annotated[
        float, Field(gt=0, le=3600, description="How long a connection without a request is kept.")
    ] = 75
    ssh_port: Annotated[
        int, Field(ge=0, le=65535, description="Port of the SSH gateway; 0: there is none. Ports below 1024 work too.")
    ] = 0
    ssh_listen: Annotated[
        Address | None, Field(description="Address of the SSH gateway; default: that of the API.")
    ] = None
    ssh_host: Annotated[
        HostName | None,
        Field(
            description="Host name of the SSH gateway as clients are told it; default: its address, where it listens on one alone."
        ),
    ] = None
    ssh_connections: Annotated[
        int, Field(ge=1, le=4096, description="SSH connections at the same time; further ones are closed at once.")
    ] = 256
    ssh_connections_per_address: Annotated[
        int, Field(ge=1, le=4096, description="Of these, how many may come from one client address.")
    ] = 32
    ssh_login_seconds: Annotated[
        float, Field(gt=0, le=600, description="How long an SSH client may take until it has shown its key.")
    ] = 20
    log_format: Annotated[Literal["console", "json"], Field(description="Form of the log lines.")] = "console"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Least severe level that is logged.")
    ] = "info"

    log_file_mb: Annotated[
        int,
        Field(
            ge=0,
            le=10_240,
            description="Log as JSON to `host/log/host.log` and `api/log/api.log` in the state directory too, rotated at this size; 0: no files.",
        ),
    ] = 0
    log_files_kept: Annotated[
        int, Field(ge=1, le=1_000, description="Rotated log files that are kept of each process.")
    ] = 5

    @model_validator(mode="after")
    def _plain_http_stays_on_loopback(self) -> Self:
        if not (self.insecure or self.listen == "localhost" or ip_address(self.listen).is_loopback):
            raise ValueError(
                "a loopback address, because the server speaks plain HTTP: put a TLS front before it, or say --insecure"
            )
        return self

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
