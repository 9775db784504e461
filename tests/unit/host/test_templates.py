"""When a template is made, who waits for it, and what happens where it cannot be made or is of no use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from innkeeper.core.host_verbs import MachineShape
from innkeeper.errors import InnkeeperError, NoHostError
from innkeeper.host import templates as module
from innkeeper.host.disks.template_store import TemplateStore
from innkeeper.host.drivers.contract import Capabilities, StartFailedError
from innkeeper.host.machine import Machine
from innkeeper.host.machine_builder import Origin
from innkeeper.host.templates import Templates

pytestmark = pytest.mark.anyio
SHAPE = MachineShape("", "a" * 64, "vm", 1, 256, 1024, "none")


@dataclass
class ScriptedDriver:
    """Keeps templates of nothing."""

    name: str = "vm"
    capabilities: Capabilities = field(default_factory=lambda: Capabilities(templates=True))
    needs: dict[str, str] = field(default_factory=lambda: {"program": "1"})
    forgotten: list[Path] = field(default_factory=list)

    async def template_needs(self) -> dict[str, str]:
        return dict(self.needs)

    async def keep(self, machine_id: str, folder: Path) -> None:
        (folder / "ram").write_bytes(machine_id.encode())

    def forget(self, folder: Path) -> None:
        self.forgotten.append(folder)


@dataclass
class World:
    """Templates over a real store, whose machines are none."""

    folder: Path
    driver: ScriptedDriver = field(default_factory=ScriptedDriver)
    built: int = 0
    discarded: int = 0
    fails: Exception | None = None
    booted: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.booted.set()
        (self.folder / "disk").write_bytes(b"disk")

    def templates(self) -> Templates:
        """As a daemon has them."""
        registry = SimpleNamespace(starting=lambda _: self.driver, usable=lambda: [self.driver])
        return Templates(
            store=TemplateStore(self.folder / "templates"),
            drivers=cast(Any, registry),
            disks=cast(Any, SimpleNamespace(disk_path=lambda _: self.folder / "disk")),
            build=self._build,
            warm_up=self._warm_up,
            discard=self._discard,
        )

    async def _build(self, shape: MachineShape) -> Machine:
        self.built += 1
        await self.booted.wait()
        if self.fails is not None:
            raise self.fails

        @asynccontextmanager
        async def in_use() -> AsyncIterator[None]:
            yield

        record = SimpleNamespace(disk="disk")
        machine = SimpleNamespace(id=f"machine-{self.built}", driver=self.driver, record=record, in_use=in_use)
        return cast(Machine, machine)

    async def _warm_up(self, machine: Machine) -> None:
        pass

    async def _discard(self, machine: Machine) -> None:
        self.discarded += 1


async def begin(origin: Origin | None) -> Machine:
    """What a start begins as, in place of a machine."""
    return cast(Machine, origin)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    # Few file systems of test machines share blocks.
    monkeypatch.setattr(module, "reflink", lambda source, target: target.write_bytes(source.read_bytes()))
    return World(tmp_path)


async def test_all_who_ask_at_once_wait_for_one_template_and_later_ones_find_it(world: World) -> None:
    world.booted.clear()
    templates = world.templates()
    asking = [asyncio.create_task(templates.start(SHAPE, begin)) for _ in range(5)]
    await asyncio.sleep(0.01)
    asking[0].cancel()
    world.booted.set()
    with pytest.raises(asyncio.CancelledError):
        await asking[0]
    origins = [await one for one in asking[1:]]
    assert (world.built, world.discarded) == (1, 1)
    assert all(isinstance(origin, Origin) and origin.template is not None for origin in origins)
    # The next daemon as well.
    assert await world.templates().start(SHAPE, begin) == origins[0]
    assert world.built == 1


async def test_a_driver_without_templates_boots(world: World) -> None:
    world.driver.capabilities = Capabilities()
    assert await world.templates().start(SHAPE, begin) is None
    assert world.built == 0


async def test_a_template_that_cannot_be_made_is_not_tried_again_for_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fails = InnkeeperError("no")
    templates = world.templates()
    assert [await templates.start(SHAPE, begin) for _ in range(3)] == [None] * 3
    assert world.built == 1
    assert list((world.folder / "templates").iterdir()) == []
    monkeypatch.setattr(module.time, "monotonic", lambda: 1e12)
    world.fails = None
    assert await templates.start(SHAPE, begin) is not None


async def test_no_room_for_another_machine_is_no_fault_of_the_template(world: World) -> None:
    world.fails = NoHostError()
    templates = world.templates()
    assert await templates.start(SHAPE, begin) is None
    world.fails = None
    assert await templates.start(SHAPE, begin) is not None


async def test_a_damaged_one_is_made_again(world: World) -> None:
    origin = cast(Origin, await world.templates().start(SHAPE, begin))
    assert origin.template is not None
    ram = origin.template / "ram"
    ram.chmod(0o600)
    ram.write_bytes(b"something else")
    assert await world.templates().start(SHAPE, begin) == origin
    assert world.built == 2
    assert ram.read_bytes() == b"machine-2"


async def test_a_guest_whose_clone_does_not_come_up_boots_and_so_do_the_next(world: World) -> None:
    templates = world.templates()

    async def clones_fail(origin: Origin | None) -> Machine:
        if origin is not None:
            raise StartFailedError
        return cast(Machine, "booted")

    assert cast(str, await templates.start(SHAPE, clones_fail)) == "booted"
    assert await templates.start(SHAPE, begin) is None
    assert list((world.folder / "templates").iterdir()) == []
    assert len(world.driver.forgotten) == 1


async def test_what_is_wrong_with_both_is_said(world: World) -> None:
    templates = world.templates()

    async def fails(origin: Origin | None) -> Machine:
        raise StartFailedError

    with pytest.raises(StartFailedError):
        await templates.start(SHAPE, fails)
    # Nothing says that it was the template.
    assert await templates.start(SHAPE, begin) is not None


async def test_no_more_are_kept_than_may_be(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    monkeypatch.setattr(module, "HELD", 1)
    templates = world.templates()
    shapes = [SHAPE, *(MachineShape("", "a" * 64, "vm", 1, size, 1024, "none") for size in (512, 1024))]
    for shape in shapes:
        await templates.start(shape, begin)
    assert len(list((world.folder / "templates").iterdir())) == 2
    assert len(world.driver.forgotten) == 2
    await templates.start(shapes[1], begin)
    assert world.built == 3
    await templates.start(shapes[0], begin)
    assert world.built == 4


async def test_those_that_nothing_can_begin_as_are_garbage(world: World) -> None:
    templates = world.templates()
    await templates.start(SHAPE, begin)
    (world.folder / "templates" / "junk").mkdir()
    (made,) = (path for path in (world.folder / "templates").iterdir() if path.name != "junk")
    assert [path.name for path in await templates.useless(lambda _: True)] == ["junk"]
    assert made in await templates.useless(lambda _: False)
    world.driver.needs = {"program": "2"}
    assert made in await templates.useless(lambda _: True)
    for path in await templates.useless(lambda _: True):
        assert await templates.drop(path.name)
    assert list((world.folder / "templates").iterdir()) == []
