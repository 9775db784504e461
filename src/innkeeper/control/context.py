"""What every use case works with, and its life from start to end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import UUID

from innkeeper.blobs.contract import Blobs
from innkeeper.blobs.directory import DirectoryBlobs
from innkeeper.bus.contract import Bus
from innkeeper.control.agent_table import AgentTable
from innkeeper.control.flights import Flights
from innkeeper.control.host_table import HostTable
from innkeeper.control.idempotency import Keys
from innkeeper.control.image_imports import Imports
from innkeeper.control.image_table import ImageTable
from innkeeper.control.image_users import ImageUsers
from innkeeper.control.live_table import LiveTable
from innkeeper.control.logs import LogFollowers
from innkeeper.control.metrics import Metrics
from innkeeper.control.ports import PortConnections
from innkeeper.control.secrets import SecretBox, load_box
from innkeeper.control.share_table import ShareTable
from innkeeper.control.ssh_keys_in_use import SshKeysInUse
from innkeeper.control.tasks import Tasks
from innkeeper.control.token_cache import TokenCache
from innkeeper.control.volume_guests import VolumeGuests
from innkeeper.control.write_behind import WriteBehind
from innkeeper.core.token import Organization
from innkeeper.diagnosis import Diagnosis
from innkeeper.log_setup import LogLevel
from innkeeper.settings import Settings
from innkeeper.store.database import Database
from innkeeper.store.profiles import StoredProfile
from innkeeper.vitals import Vitals

if TYPE_CHECKING:
    from innkeeper.control.image_builds import LiveBuild
    from innkeeper.control.snapshot_builds import LiveSnapshotBuild


class Control:
    """The control side of one server. Between `start` and `close` the use cases may be called, from one event loop."""

    def __init__(
        self, settings: Settings, database: Database, bus: Bus, *, blobs: Blobs, box: SecretBox, level: LogLevel
    ) -> None:
        self.settings = settings
        self.log_level = level
        self.diagnosis = Diagnosis()
        self.vitals = Vitals("api")
        self.database = database
        self.bus = bus
        self.blobs = blobs
        self.box = box
        self.metrics = Metrics()
        self.tasks = Tasks()
        self.flights = Flights(self.tasks)
        self.later = WriteBehind()
        self.tokens = TokenCache()
        self.ssh_keys_in_use = SshKeysInUse()
        self.live = LiveTable()
        self.keys = Keys()
        self.hosts = HostTable()
        self.profiles: dict[UUID, StoredProfile] = {}
        self.organizations: dict[UUID, Organization] = {}
        self.images = ImageTable()
        self.agents = AgentTable()
        self.image_users = ImageUsers()
        self.builds: dict[UUID, LiveBuild] = {}
        self.snapshot_builds: dict[UUID, LiveSnapshotBuild] = {}
        self.imports = Imports()
        self.shares = ShareTable()
        self.volume_guests = VolumeGuests()
        self.log_followers = LogFollowers()
        self.port_connections = PortConnections(settings.port_connections)
        self.default_organization_id: UUID | None = None
        # When each profile was last used, in seconds of the monotonic clock: what warm pools follow.
        self.profile_used: dict[UUID, float] = {}
        # Held while usage is counted: the same seconds must not be added twice.
        self.counting = asyncio.Lock()
        # When a VM was made last, in the same seconds; None: not in this process's time.
        self.vms_used: float | None = None
        self.expiry_hint = asyncio.Event()
        self.pools_hint = asyncio.Event()
        # Snapshots that VMs are being made of at this moment, and that go then.
        self.forking: set[UUID] = set()
        self.reconcile_hint = asyncio.Event()
        self.snapshots_hint = asyncio.Event()

    async def start(self) -> None:
        """Load what the database knows, adopt what the hosts run, and begin the background work.

        `organizations.bootstrap` must have run. Hosts that do not answer now are taken in when they do.
        """
        # Imported here because the loops import this module for its type.
        from innkeeper.control import background

        await self.tasks.start()
        await background.begin(self)

    async def close(self) -> None:
        """End the background work and write what is still to be written. Guests go on. Idempotent."""
        await self.tasks.close()
        await self.later.flush(self)


def build_control(settings: Settings, database: Database, bus: Bus, *, level: LogLevel | None = None) -> Control:
    """The control side over an open database and a bus; `level` is what the operator may change this process's logging by.

    Raises:
        ValueError: the master key cannot be used.

    """
    box = load_box(settings)
    return Control(
        settings,
        database,
        bus,
        blobs=DirectoryBlobs(settings.api_dir / "blobs"),
        box=box,
        level=level or LogLevel(settings.log_level),
    )
