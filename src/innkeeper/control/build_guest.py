"""A guest in which an image is built: an instance of the organization that has no room, and goes with the build."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

from innkeeper.bus.contract import Data, Message
from innkeeper.control import clock
from innkeeper.control.host_table import HostEntry
from innkeeper.control.passing_guest import passing_guest
from innkeeper.core.build_step import RunStep
from innkeeper.core.build_verbs import PackFiles, SaveStep, UnpackFiles
from innkeeper.core.host_verbs import EnsureMachine, Execute, MachineShape, to_wire
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.isolation import Offer
from innkeeper.errors import UnavailableError
from innkeeper.ids import public_key_id, uuid7
from innkeeper.store.image_builds import LABEL

if TYPE_CHECKING:
    from innkeeper.control.context import Control

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
    async with passing_guest(control, instance, request):
        yield BuildGuest(control, host_id, instance.id)
