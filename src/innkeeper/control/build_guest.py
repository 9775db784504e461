"""A guest in which an image is built: an instance of the organization that has no room, and goes with the build."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
import sqlalchemy as sa
import structlog

from innkeeper.bus.contract import Data, Message
from innkeeper.control import clock, provisioning, usage
from innkeeper.control.host_table import HostEntry
from innkeeper.core.build_step import RunStep
from innkeeper.core.build_verbs import PackFiles, SaveStep, UnpackFiles
from innkeeper.core.host_verbs import DestroyMachine, EnsureMachine, Execute, MachineShape, to_wire
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.isolation import Offer
from innkeeper.errors import InnkeeperError, UnavailableError
from innkeeper.ids import public_key_id, uuid7
from innkeeper.store import instances
from innkeeper.store.image_builds import LABEL

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

ENSURE_SECONDS = 300.0
DESTROY_SECONDS = 60.0
SAVE_SECONDS = 300.0
# Longest silence of a stream of files; unpacking a piece of many small files takes its time.
STALL_SECONDS = 300.0
STEP_SECONDS_MAX = 3_600.0
GRACE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class GuestPlan:
    """What a build's guest is made of: an image, perhaps with a kept step on it, on a host, by one of its drivers."""

    build_id: UUID
    organization_id: UUID
    host: HostEntry
    offer: Offer
    image_digest: str
    step_key: str | None
    egress_mode: str


class BuildGuest:
    """A running guest of a build."""

    def __init__(self, control: Control, host_id: UUID, instance_id: UUID) -> None:
        self._control = control
        self._host_id = host_id
        self._instance_id = instance_id

    async def run(self, step: RunStep, on_output: Callable[[bytes], None]) -> int:
        """Run a step to its end; its exit code, 124 after an hour. Raises the typed error when it could not be run."""
        verb = Execute(
            instance_id=self._instance_id,
            execution_id=uuid7(),
            command="",
            timeout_seconds=STEP_SECONDS_MAX,
            cwd=step.workdir,
            env=step.env,
            stdin=step.stdin is not None,
            stream=True,
            argv=step.argv,
            user=step.user,
            exact_env=True,
        )
        async with self._control.bus.open(self._host_id, Execute.verb, to_wire(verb)) as call:
            if step.stdin is not None:
                # At most 256 KiB, the size of a Dockerfile: less than the credit of a stream.
                await call.send_data(step.stdin.encode())
                await call.send_end()
            async with asyncio.timeout(STEP_SECONDS_MAX + GRACE_SECONDS):
                async for event in call.events():
                    if isinstance(event, Data):
                        on_output(event.data)
                answer = await call.result()
        return int(answer["exit_code"])

    async def unpack(self, pieces: AsyncIterable[bytes], destination: str, **options: Any) -> int:
        """Unpack a tar stream in the guest; how many files it made. `options` are those of `UnpackFiles`."""
        verb = UnpackFiles(self._instance_id, destination, **options)
        async with self._control.bus.open(self._host_id, UnpackFiles.verb, to_wire(verb)) as call:
            async for piece in pieces:
                async with asyncio.timeout(STALL_SECONDS):
                    await call.send_data(piece)
            await call.send_end()
            async with asyncio.timeout(STALL_SECONDS):
                answer = await call.result()
        return int(answer["files"])

    @asynccontextmanager
    async def pack(self, sources: tuple[str, ...]) -> AsyncIterator[tuple[bool, AsyncIterator[bytes]]]:
        """(whether it is a single file, a tar stream) of files of the guest. Raises FileMissingError."""
        verb = PackFiles(self._instance_id, sources)
        async with self._control.bus.open(self._host_id, PackFiles.verb, to_wire(verb)) as call:
            events = aiter(call.events())
            async with asyncio.timeout(STALL_SECONDS):
                head = await anext(events, None)
            if not isinstance(head, Message):
                raise UnavailableError("The host answered out of turn")

            async def pieces() -> AsyncIterator[bytes]:
                async for event in events:
                    if isinstance(event, Data):
                        yield event.data

            yield bool(head.body["single"]), pieces()

    async def save(self, key: str) -> None:
        """Keep the guest's disk under a key."""
        verb = SaveStep(self._instance_id, key)
        await self._control.bus.request(self._host_id, SaveStep.verb, to_wire(verb), timeout_seconds=SAVE_SECONDS)


@asynccontextmanager
async def open_guest(control: Control, plan: GuestPlan) -> AsyncIterator[BuildGuest]:
    """A guest for the block; nothing of it is left afterwards.

    Raises:
        RateLimitedError: a limit of the organization.
        UnavailableError, NoHostError: the host has no room for it.
        NotFoundError: the kept step is not there any more.

    """
    settings = control.settings
    host_id = plan.host.host.id
    instance = Instance(
        id=uuid7(),
        organization_id=plan.organization_id,
        public_id=public_key_id(),
        profile_id=plan.build_id,
        image="",
        # It has no room, so nobody looks at its state: this one says that nothing is left to be done.
        state=InstanceState.READY,
        created_at=clock.now(),
        host_id=host_id,
        labels={LABEL: str(plan.build_id)},
        image_digest=plan.image_digest,
        vcpu_count=settings.build_vcpus,
        memory_mb=settings.build_memory_mb,
        disk_mb=settings.build_disk_mb,
    )
    organization = await provisioning.organization_of(control, plan.organization_id)

    def insert(connection: sa.Connection) -> None:
        provisioning.check_limits(connection, organization, instance.memory_mb)
        instances.insert(connection, instance, lock_token=None, now=instance.created_at, ttl_seconds=0)

    shape = MachineShape(
        pool_key="",
        image_digest=plan.image_digest,
        driver=plan.offer.driver,
        vcpu_count=instance.vcpu_count,
        memory_mb=instance.memory_mb,
        disk_mb=instance.disk_mb,
        egress_mode=plan.egress_mode,
    )
    request = EnsureMachine(
        instance.id, shape, f"build-{instance.id.hex[-8:]}", user="root", step_key=plan.step_key, bare=True
    )
    await control.database.write(insert)
    try:
        await control.bus.request(host_id, EnsureMachine.verb, to_wire(request), timeout_seconds=ENSURE_SECONDS)
        yield BuildGuest(control, host_id, instance.id)
    finally:
        # Cancelled or not: whoever cancels waits for this.
        with anyio.CancelScope(shield=True):
            await _take_away(control, host_id, instance.id)


async def _take_away(control: Control, host_id: UUID, instance_id: UUID) -> None:
    try:
        await control.bus.request(
            host_id, DestroyMachine.verb, to_wire(DestroyMachine(instance_id)), timeout_seconds=DESTROY_SECONDS
        )
    except InnkeeperError as error:
        # Without a row it is an orphan, which the reconciler has the host destroy.
        log.warning("a build's guest is left to the reconciler", instance_id=str(instance_id), reason=error.message)
        control.reconcile_hint.set()
    with contextlib.suppress(InnkeeperError):
        # What it used is the organization's as long as its row says so.
        await usage.count_host(control, host_id)
    await control.database.write(instances.delete, instance_id)
