"""Templates of machines: made once of what comes up cold, so that every further machine of the kind begins as a clone of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from innkeeper.core.host_verbs import MachineShape
from innkeeper.errors import InnkeeperError, LinkLostError, NoHostError
from innkeeper.host.completion import to_its_end
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.disk_template import reflink
from innkeeper.host.disks.template_store import DISK, MEMORY, Template, TemplateKey, TemplateStore
from innkeeper.host.drivers.contract import Driver, StartFailedError, Templating, templating
from innkeeper.host.drivers.registry import DriverRegistry
from innkeeper.host.machine import Machine
from innkeeper.host.machine_builder import WARM_LINES, Origin

log = structlog.stdlib.get_logger(__name__)

# Of one that could not be made. Its guests boot meanwhile.
RETRY_SECONDS = 300.0
# On the disk, some 150 MB each; and of these with their memory held by the host, so that a clone need not wait for it.
KEPT = 16
HELD = 8


class Templates:
    """The templates of a host, made when they are wanted first.

    Args:
        build: makes a machine whose agent answers, for a template (the caller's admission included).
        warm_up: gives it a name for the time being, and has it run what is to be in its memory.
        discard: stops a machine and releases everything of it.

    """

    def __init__(
        self,
        *,
        store: TemplateStore,
        drivers: DriverRegistry,
        disks: DiskPool,
        build: Callable[[MachineShape], Awaitable[Machine]],
        warm_up: Callable[[Machine], Awaitable[None]],
        discard: Callable[[Machine], Awaitable[None]],
    ) -> None:
        self._store = store
        self._drivers = drivers
        self._disks = disks
        self._build = build
        self._warm_up = warm_up
        self._discard = discard
        self._flights: dict[str, asyncio.Task[bool]] = {}
        self._not_before: dict[str, float] = {}
        # Those whose memory is held, the one that was used last at the end.
        self._held: dict[str, Template] = {}

    async def start(self, shape: MachineShape, begin: Callable[[Origin | None], Awaitable[Machine]]) -> Machine:
        """A machine on a new disk, begun as a clone where that is possible, else booted. Raises what `begin` raises.

        The first of a kind waits until the template is made, which takes one boot.
        """
        driver = self._drivers.starting(shape.driver)
        if not driver.capabilities.templates:
            return await begin(None)
        key = await self._key(driver, shape)
        name, failed = key.digest, False
        if await self._is_there(key, shape):
            with self._store.reading(key) as template:
                if template is None:
                    self._let_go(name)
                else:
                    self._hold(template)
                    try:
                        return await begin(Origin(template.disk, template=template.memory))
                    except (StartFailedError, LinkLostError) as error:
                        log.warning("a clone did not come up, and boots", template=name[:12], error=str(error))
                        failed = True
        machine = await begin(None)
        if failed:
            # So it was the template: it is made anew, after a while.
            self._not_before[name] = time.monotonic() + RETRY_SECONDS
            await self.drop(name)
        return machine

    def held_bytes(self) -> int:
        """What of the host's memory is held for clones."""
        return sum(
            templating(driver).held_bytes() for driver in self._drivers.usable() if driver.capabilities.templates
        )

    async def _key(self, driver: Driver, shape: MachineShape) -> TemplateKey:
        return TemplateKey(
            driver=driver.name,
            needs=await templating(driver).template_needs(),
            image_digest=shape.image_digest,
            vcpu_count=shape.vcpu_count,
            memory_mb=shape.memory_mb,
            disk_mb=shape.disk_mb,
            user=shape.user,
            warmed=WARM_LINES,
        )

    async def _is_there(self, key: TemplateKey, shape: MachineShape) -> bool:
        name = key.digest
        if self._not_before.get(name, 0.0) > time.monotonic():
            return False
        if name in self._held:
            return True
        flight = self._flights.get(name)
        if flight is None:
            flight = asyncio.get_running_loop().create_task(self._found_or_made(key, shape))
            self._flights[name] = flight
            flight.add_done_callback(lambda _: self._flights.pop(name, None))
        # Whoever gives up waiting does not take it from the others.
        return await asyncio.shield(flight)

    async def _found_or_made(self, key: TemplateKey, shape: MachineShape) -> bool:
        try:
            with self._store.reading(key) as template:
                if template is not None and await asyncio.to_thread(self._store.is_whole, template):
                    return True
            if template is not None:
                log.warning("a template is damaged, and made again", template=key.digest[:12])
                await asyncio.to_thread(self._store.drop, key.digest)
            await self._make(key, shape)
        except NoHostError:
            # There is no room for another machine now; nothing is wrong with the template.
            return False
        except (InnkeeperError, OSError, TimeoutError) as error:
            log.warning("a template could not be made: its guests boot", template=key.digest[:12], error=str(error))
            self._not_before[key.digest] = time.monotonic() + RETRY_SECONDS
            return False
        return True

    async def _make(self, key: TemplateKey, shape: MachineShape) -> None:
        began = time.monotonic()
        machine = await self._build(shape)
        try:
            async with machine.in_use():
                await self._warm_up(machine)
                with self._store.draft() as draft:
                    (draft / MEMORY).mkdir(mode=0o700)
                    await templating(machine.driver).keep(machine.id, draft / MEMORY)
                    reflink(self._disks.disk_path(machine.record.disk), draft / DISK)
                    await to_its_end(asyncio.to_thread(self._store.publish, draft, key))
        finally:
            await self._discard(machine)
        seconds = round(time.monotonic() - began, 2)
        log.info("made a template", template=key.digest[:12], image=shape.image_digest[:12], seconds=seconds)
        await self._drop_beyond_limit()

    async def _drop_beyond_limit(self) -> None:
        templates = await asyncio.to_thread(self._store.all)
        for template in templates[:-KEPT]:
            await self.drop(template.folder.name)

    def _hold(self, template: Template) -> None:
        name = template.folder.name
        self._held.pop(name, None)
        self._held[name] = template
        while len(self._held) > HELD:
            self._let_go(next(iter(self._held)))

    def _let_go(self, name: str) -> None:
        template = self._held.pop(name, None)
        if template is not None:
            self._driver_of(template).forget(template.memory)

    def _driver_of(self, template: Template) -> Templating:
        return templating(self._drivers.starting(template.key.driver))

    async def drop(self, name: str) -> bool:
        """Remove a template by its folder's name, unless a machine is being started of it; whether it went. Machines that run are not touched."""
        if not await asyncio.to_thread(self._store.drop, name):
            return False
        self._let_go(name)
        return True

    async def useless(self, has_image: Callable[[str], bool]) -> list[Path]:
        """Folders that no machine can be started of any more: of an image that is not here, of another kernel or program, of another version of the server."""
        needs: dict[str, dict[str, str]] = {}
        for driver in self._drivers.usable():
            # Its program may have gone since the start.
            with contextlib.suppress(OSError):
                if driver.capabilities.templates:
                    needs[driver.name] = await templating(driver).template_needs()
        return [
            *(
                template.folder
                for template in await asyncio.to_thread(self._store.all)
                if not has_image(template.key.image_digest)
                or template.key.warmed != WARM_LINES
                or needs.get(template.key.driver) != template.key.needs
            ),
            *await asyncio.to_thread(self._store.unreadable),
        ]

    async def close(self) -> None:
        """Give up what is being made."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        for flight in flights:
            with contextlib.suppress(asyncio.CancelledError):
                await flight
        for name in list(self._held):
            self._let_go(name)
