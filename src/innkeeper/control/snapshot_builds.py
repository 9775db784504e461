"""Snapshots made of OCI images: the image is fetched, what is asked for is installed on it in a guest, and VMs begin with what came of that.

The row owns the digest of the image's file, first of what was fetched, then of what was made of it: no host removes a file that a row names, and a row
that a crash left unfinished fails at the next start and names none.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import anyio
import sqlalchemy as sa
import structlog

from innkeeper.control import audit, build_log, clock, image_builds, image_imports, images, placement, registries
from innkeeper.control.access import require
from innkeeper.control.build_log import BuildLog
from innkeeper.control.build_run import BuildJob, BuildRun, Built
from innkeeper.control.host_table import HostEntry
from innkeeper.core.host_verbs import ImportImage
from innkeeper.core.image_build import BuildStatus
from innkeeper.core.image_config import ImageConfig
from innkeeper.core.isolation import Offer
from innkeeper.core.snapshot import Snapshot, SnapshotStatus
from innkeeper.core.snapshot_build import BASE, SnapshotBuildRequest
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import ConflictError, RateLimitedError, SnapshotNotFoundError
from innkeeper.ids import parse_uuid, uuid7
from innkeeper.store import audit_events, leases
from innkeeper.store import snapshots as store
from innkeeper.store import vms as vm_store
from innkeeper.store.tables import snapshots as table

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

CANCEL_SECONDS = 90.0
MIB_PER_GIB = 1_024


class LiveSnapshotBuild:
    """A build that has not ended. `ended` is set when nothing of it runs any more."""

    def __init__(self, snapshot: Snapshot, path: Path) -> None:
        self.snapshot = snapshot
        self.lease = uuid4()
        self.log = BuildLog(path)
        self.scope = anyio.CancelScope()
        self.ended = asyncio.Event()


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where it is made: all of it on one host."""

    host: HostEntry
    offer: Offer


async def build(control: Control, principal: Principal, request: SnapshotBuildRequest) -> Snapshot:
    """A snapshot that is being made of an image; what becomes of it is in its row and its log.

    Raises:
        RateLimitedError: the organization builds as much, or has as many snapshots or as much space of images, as it may.
        NoHostError, UnavailableError: no host could build it now; nothing is begun.

    """
    require(principal, Scope.PROFILES)
    reference = request.reference
    known = await registries.credential(control, principal.organization_id, reference.registry)
    username, password = known if known is not None else (None, None)
    await images.check_quota(control, principal.organization_id)
    place = _Place(*placement.choose_for_build(control))
    image_builds.check_room(control, principal.organization_id)
    snapshot = _planned(control, principal, request, place.host)
    live = LiveSnapshotBuild(snapshot, _log_path(control, snapshot.id))
    # Before anything is awaited: the next one who asks finds it under way.
    control.snapshot_builds[snapshot.id] = live
    details = {"name": snapshot.name, "from": str(reference)}
    event = audit.event(principal, "snapshot.create", "snapshot", snapshot.id, details)
    limit = control.settings.max_snapshots

    def insert(connection: sa.Connection) -> None:
        if store.count(connection, snapshot.organization_id) >= limit:
            raise RateLimitedError(
                f"The organization has {limit} snapshots, which is the limit; delete one first", retry_after_seconds=10
            )
        # As long as fetching and building may take together.
        ttl_seconds = control.settings.import_timeout_seconds + control.settings.build_timeout_seconds + 120
        store.insert(connection, snapshot, lock_token=live.lease, now=snapshot.created_at, ttl_seconds=ttl_seconds)
        audit_events.insert(connection, event)

    try:
        await control.database.write(insert)
        control.metrics.image_builds += 1
        fetched = ImportImage("registry", str(reference), username, password)
        control.tasks.spawn(_work(control, live, request, fetched, place), name="snapshot build")
    except BaseException:
        control.snapshot_builds.pop(snapshot.id, None)
        live.log.close()
        _log_path(control, snapshot.id).unlink(missing_ok=True)
        raise
    return snapshot


def _planned(control: Control, principal: Principal, request: SnapshotBuildRequest, host: HostEntry) -> Snapshot:
    snapshot_id = uuid7()
    return Snapshot(
        id=snapshot_id,
        organization_id=principal.organization_id,
        instance_id=None,
        host_id=host.host.id,
        name=request.label,
        status=SnapshotStatus.CREATING,
        created_at=clock.now(),
        memory=False,
        driver=None,
        image=str(request.reference),
        image_digest="",
        image_config=None,
        vcpu_count=request.vcpu_count,
        memory_mb=request.memory_mb,
        disk_mb=control.settings.vm_disk_mb if request.disk_gb is None else request.disk_gb * MIB_PER_GIB,
        oci_image=request.oci_image,
        env_sealed=control.box.seal_env(
            dict(request.envs), organization_id=principal.organization_id, object_id=snapshot_id
        ),
    )


async def delete(control: Control, principal: Principal, snapshot: Snapshot, *, reason: str | None = None) -> Snapshot:
    """The snapshot that is no more; a build of it is stopped first. Its file goes when nothing stands on it. A `reason` is for the audit log.

    Raises:
        SnapshotNotFoundError.
        ConflictError: a VM is still to begin with it, which is named; or another process builds it.

    """
    live = control.snapshot_builds.get(snapshot.id)
    if live is not None:
        live.scope.cancel()
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                await live.ended.wait()
        except TimeoutError:
            raise ConflictError("The snapshot is still being built") from None
    details = {"name": snapshot.name} | ({} if reason is None else {"reason": reason})
    event = audit.event(principal, "snapshot.delete", "snapshot", snapshot.id, details)

    def remove(connection: sa.Connection) -> None:
        if waiting := vm_store.beginning_with(connection, snapshot.id):
            raise ConflictError(f"The VM {waiting[0].vm_id} is still to begin with the snapshot")
        if leases.take(connection, table, snapshot.id, now=clock.now(), ttl_seconds=60) is None:
            if store.get(connection, snapshot.id) is None:
                raise SnapshotNotFoundError
            raise ConflictError("The snapshot is being built")
        store.delete(connection, snapshot.id)
        audit_events.insert(connection, event)

    await control.database.write(remove)
    await asyncio.to_thread(_log_path(control, snapshot.id).unlink, missing_ok=True)
    await images.collect_everywhere(control)
    return dataclasses.replace(snapshot, status=SnapshotStatus.DELETING)


def events(control: Control, snapshot: Snapshot, *, after: int = 0) -> AsyncGenerator[dict[str, Any] | None, None]:
    """What the build of a snapshot said after event number `after`, as it goes on, until its end; None now and then while it is silent."""
    live = control.snapshot_builds.get(snapshot.id)
    return build_log.follow(_log_path(control, snapshot.id), None if live is None else live.log, after=after)


async def recover(control: Control) -> None:
    """At the start: what an earlier process was building has failed; logs of snapshots that are no more go."""
    interrupted = await control.database.write(store.fail_builds, image_builds.INTERRUPTED)
    known = await control.database.read(store.image_ids)
    await asyncio.to_thread(_tidy, control, known, interrupted)
    if interrupted:
        log.warning("builds of snapshots were interrupted", count=len(interrupted))


def _tidy(control: Control, known: set[UUID], interrupted: list[UUID]) -> None:
    folder = _log_path(control, uuid4()).parent
    for path in folder.iterdir() if folder.exists() else ():
        if parse_uuid(path.stem) not in known:
            path.unlink(missing_ok=True)
    for snapshot_id in interrupted:
        status, error = SnapshotStatus.FAILED.value, image_builds.INTERRUPTED
        build_log.append_end(_log_path(control, snapshot_id), status=status, error=error)


def _log_path(control: Control, snapshot_id: UUID) -> Path:
    return control.settings.api_dir / "snapshot-logs" / f"{snapshot_id}.log"


async def _work(
    control: Control, live: LiveSnapshotBuild, request: SnapshotBuildRequest, fetched: ImportImage, place: _Place
) -> None:
    """A build from its beginning to its end, whatever that is."""
    status, error = BuildStatus.FAILED, image_builds.INTERRUPTED
    try:
        status, error = await image_builds.attempt(
            control, live.scope, live.snapshot.id, lambda: _build(control, live, request, fetched, place)
        )
    finally:
        await _end(control, live, status, error)
    if status is not BuildStatus.READY:
        # The image that was fetched is of no use.
        await images.collect_everywhere(control)


async def _build(
    control: Control, live: LiveSnapshotBuild, request: SnapshotBuildRequest, fetched: ImportImage, place: _Place
) -> None:
    async def note_fetched(made: Built, config: ImageConfig) -> None:
        await _name(control, live, made, config)

    await image_imports.fetch(control, place.host.host.id, fetched, log=live.log, register=note_fetched)
    config = live.snapshot.image_config or ImageConfig()
    plan = request.plan(config)
    if plan is not None:
        job = BuildJob(
            build_id=live.snapshot.id,
            organization_id=live.snapshot.organization_id,
            plan=plan,
            digests={BASE: live.snapshot.image_digest},
            context=None,
            egress_mode="internet",
            # Packages and branches are what they are now, not what they were then.
            use_cache=False,
        )

        async def note_built(built: Built) -> None:
            await _name(control, live, built, config)

        async with asyncio.timeout(control.settings.build_timeout_seconds):
            await BuildRun(control, job, host=place.host, offer=place.offer, log=live.log).run(note_built)
    ready = dataclasses.replace(live.snapshot, status=SnapshotStatus.READY)
    if not await _store(control, live, ready, release=True):
        raise ConflictError("The snapshot was deleted meanwhile")


async def _name(control: Control, live: LiveSnapshotBuild, built: Built, config: ImageConfig) -> None:
    """Have the row own the file, before anybody could take it for unwanted."""
    named = dataclasses.replace(
        live.snapshot, image_digest=built.digest, image_config=config, disk_bytes=built.size_bytes
    )
    async with control.images.naming:
        if not await _store(control, live, named, release=False):
            raise ConflictError("The snapshot was deleted meanwhile")


async def _store(control: Control, live: LiveSnapshotBuild, snapshot: Snapshot, *, release: bool) -> bool:
    """Whether it could be: its row is there, and this build's."""
    values = store.outcome(snapshot)
    # Whoever renames it does so while it is being built, too.
    del values["name"]
    written = await control.database.write(leases.apply, table, snapshot.id, live.lease, values, release=release)
    if written:
        live.snapshot = snapshot
    return written


async def _end(control: Control, live: LiveSnapshotBuild, status: BuildStatus, error: str) -> None:
    """Write down what became of a build. Not undone by whoever cancels."""
    error = error[-image_builds.ERROR_CHARACTERS :]
    control.metrics.image_build_failures += status is BuildStatus.FAILED
    try:
        if live.snapshot.status is SnapshotStatus.CREATING:
            failed = dataclasses.replace(
                live.snapshot, status=SnapshotStatus.FAILED, error=error, image_digest="", disk_bytes=None
            )
            with anyio.CancelScope(shield=True):
                await _store(control, live, failed, release=True)
    finally:
        digest = live.snapshot.image_digest or None
        live.log.event("end", status=str(live.snapshot.status), error=live.snapshot.error, digest=digest)
        live.log.close()
        control.snapshot_builds.pop(live.snapshot.id, None)
        live.ended.set()
