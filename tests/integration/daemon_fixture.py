"""A real host daemon in this process, reached over the in-process bus as the API process would."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.integration import image_fixture

from innkeeper.bus.contract import Data, Message
from innkeeper.bus.in_process import in_process_bus
from innkeeper.bus.link_bus import LinkBus
from innkeeper.core import host_verbs as verbs
from innkeeper.core.host_verbs import MachineShape, to_wire
from innkeeper.errors import LinkLostError
from innkeeper.host.daemon import Daemon, run_daemon
from innkeeper.host.disks.image_store import ImageRecord
from innkeeper.host.machine import Machine
from innkeeper.settings import Settings

REPOSITORY = Path(__file__).parents[2]
NEEDS_RUNSC = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc")
PATIENCE_SECONDS = 30.0
# A microVM whose instructions are translated was seen to take over a minute for its first start on a busy machine.
START_SECONDS = 300.0


@functools.cache
def built_agent() -> Path:
    """The guest agent of this checkout."""
    return build_go(REPOSITORY / "guest", "inn-agent")


def build_go(module: Path, name: str) -> Path:
    """A static binary of a Go module. Its folder outlives the tests no longer than the process."""
    folder = Path(tempfile.mkdtemp(prefix="innkeeper-tests-go-"))
    try:
        subprocess.run(
            ["go", "build", "-trimpath", "-ldflags", "-s -w", "-o", folder / name, "."],
            cwd=module,
            env={**os.environ, "CGO_ENABLED": "0"},
            check=True,
        )
        target = image_fixture.cache_directory() / "go" / f"{name}-{os.getpid()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{name}-*"):
            if not Path("/proc", old.name.rpartition("-")[2]).exists():
                old.unlink(missing_ok=True)
        shutil.copyfile(folder / name, target)
        target.chmod(0o755)
    finally:
        shutil.rmtree(folder)
    return target


@dataclass
class Answer:
    """What a command left: its answer, and its output as far as it was sent."""

    body: dict[str, Any]
    output: bytes
    execution_id: UUID
    errors: bytes = b""

    @property
    def exit_code(self) -> int:
        return int(self.body["exit_code"])

    @property
    def text(self) -> str:
        return self.output.decode()

    @property
    def changed(self) -> dict[str, str]:
        """Path -> status."""
        return {row["path"]: row["status"] for row in self.body["files_changed"]}


@dataclass
class Host:
    """One running daemon and the bus to it."""

    settings: Settings
    daemon: Daemon
    bus: LinkBus
    image: ImageRecord
    instances: set[UUID] = field(default_factory=set)
    # What guests are started with, where a test does not say; else the first that there is.
    driver: str | None = None

    def shape(self, pool_key: str = "", **changes: Any) -> MachineShape:
        """A small guest of the base image."""
        plain = MachineShape(
            pool_key=pool_key,
            image_digest=self.image.digest,
            driver=self.driver
            or next(
                offer.driver
                for offer in self.daemon.drivers.offers()
                if offer.isolation is not None and self.settings.driver in ("auto", offer.driver)
            ),
            vcpu_count=1,
            memory_mb=512,
            disk_mb=2048,
            egress_mode="none",
            user="user",
        )
        return replace(plain, **changes)

    async def request(self, verb: Any, *, timeout_seconds: float = 180) -> dict[str, Any]:
        """One verb without streams."""
        return await self.bus.request(self.daemon.host_id, verb.verb, to_wire(verb), timeout_seconds=timeout_seconds)

    async def ensure(self, instance_id: UUID | None = None, *, shape: MachineShape | None = None, **more: Any) -> UUID:
        """An instance with a ready machine."""
        instance_id = instance_id or uuid4()
        self.instances.add(instance_id)
        await self.ensure_answer(instance_id, shape=shape, **more)
        return instance_id

    async def ensure_answer(
        self, instance_id: UUID, *, shape: MachineShape | None = None, **more: Any
    ) -> dict[str, Any]:
        """The whole answer of `machine.ensure`."""
        self.instances.add(instance_id)
        request = verbs.EnsureMachine(instance_id, shape or self.shape(), "guest", **more)
        return await self.request(request, timeout_seconds=START_SECONDS)

    async def destroy(self, instance_id: UUID, *, keep_disk: bool = False) -> None:
        """The instance's machine taken away."""
        await self.request(verbs.DestroyMachine(instance_id, keep_disk))
        self.instances.discard(instance_id)

    def machine(self, instance_id: UUID) -> Machine:
        """The daemon's own view of an instance's machine."""
        return self.daemon.fleet.machine(instance_id)

    async def run(
        self, instance_id: UUID, command: str, *, timeout_seconds: float = 60, stdin: bytes | None = None, **more: Any
    ) -> Answer:
        """Run a shell line to its end."""
        execution_id = more.pop("execution_id", None) or uuid4()
        request = verbs.Execute(instance_id, execution_id, command, timeout_seconds, stdin=stdin is not None, **more)
        output, errors = bytearray(), bytearray()
        async with (
            asyncio.timeout(timeout_seconds + PATIENCE_SECONDS),
            self.bus.open(self.daemon.host_id, request.verb, to_wire(request)) as call,
        ):
            if stdin is not None:
                # A command may end before it has read all of it.
                with contextlib.suppress(LinkLostError):
                    await call.send_data(stdin)
                    await call.send_end()
            async for event in call.events():
                if isinstance(event, Data):
                    (output if event.channel == 1 else errors).extend(event.data)
            return Answer(await call.result(), bytes(output), execution_id, bytes(errors))

    async def ok(self, instance_id: UUID, command: str, **more: Any) -> Answer:
        """Run a shell line that must succeed."""
        answer = await self.run(instance_id, command, **more)
        assert answer.exit_code == 0, answer.output[-2000:]
        return answer

    async def output(
        self, instance_id: UUID, execution_id: UUID, *, offset: int = 0, limit: int = 16_777_216
    ) -> tuple[dict[str, Any], bytes]:
        """A slice of a journal: what is said about it, and its bytes."""
        said, data = {}, bytearray()
        request = verbs.ReadOutput(instance_id, execution_id, offset, limit)
        async with self.bus.open(self.daemon.host_id, request.verb, to_wire(request)) as call:
            async for event in call.events():
                if isinstance(event, Message):
                    said = event.body
                elif isinstance(event, Data):
                    data += event.data
            return {**said, **await call.result()}, bytes(data)

    async def read(self, instance_id: UUID, path: str, **more: Any) -> tuple[dict[str, Any], bytes]:
        """A file: what is said about it, and its bytes."""
        said, data = {}, bytearray()
        request = verbs.ReadFile(instance_id, path, **more)
        async with self.bus.open(self.daemon.host_id, request.verb, to_wire(request)) as call:
            async for event in call.events():
                if isinstance(event, Message):
                    said = event.body
                elif isinstance(event, Data):
                    data += event.data
            return {**said, **await call.result()}, bytes(data)

    async def write(self, instance_id: UUID, path: str, *pieces: bytes, **more: Any) -> dict[str, Any]:
        """Write a file."""
        request = verbs.WriteFile(instance_id, path, **more)
        async with self.bus.open(self.daemon.host_id, request.verb, to_wire(request)) as call:
            for piece in pieces:
                await call.send_data(piece)
            await call.send_end()
            return await call.result()

    async def status(self) -> dict[str, Any]:
        """`host.status`."""
        return await self.request(verbs.HostStatus())

    async def listed(self, instance_id: UUID) -> dict[str, Any] | None:
        """The instance's row of `machine.list`, or None."""
        answer = await self.request(verbs.ListMachines())
        return next((row for row in answer["machines"] if row["instance_id"] == str(instance_id)), None)


@asynccontextmanager
async def running_host(
    home: Path, *, agent: Path | None = None, keep_running: bool = False, **overrides: Any
) -> AsyncIterator[Host]:
    """A daemon on the state directory `home`; with `keep_running` its guests wait for the next one."""
    settings = Settings(
        home=home,
        images="base",
        **{"runsc_platform": "systrap", "pool_disk_mb": 16_384, "freeze_after_seconds": 0.3, **overrides},
    )
    settings.host_dir.mkdir(parents=True, exist_ok=True)
    store = image_fixture.put_into(settings.host_dir, "base")
    image = store.get("base")
    assert image is not None
    async with (
        run_daemon(
            settings,
            agent_binary=agent or built_agent(),
            recipes=image_fixture.RECIPES,
            progress=print,
            keep_running=keep_running,
        ) as daemon,
        in_process_bus(daemon.host_id, daemon.handlers) as bus,
    ):
        yield Host(settings, daemon, bus, image)


async def eventually(
    question: Callable[[], Awaitable[Any]] | Callable[[], Any], *, seconds: float = PATIENCE_SECONDS
) -> Any:
    """The first true answer to a question that is asked until then."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline, "it did not become so"
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def host(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with running_host(tmp_path_factory.mktemp("home")) as host:
        yield host


@pytest.fixture
async def instance(host: Host) -> AsyncIterator[UUID]:
    """A ready instance of its own."""
    instance_id = await host.ensure()
    yield instance_id
    await host.destroy(instance_id)
