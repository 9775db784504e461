"""Carries out a build plan: finds the steps that are kept, runs the others in guests, keeps them, and has the result made an image."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio.to_thread

from innkeeper.bus.contract import Message
from innkeeper.control import build_files
from innkeeper.control.build_guest import BuildGuest, GuestPlan, open_guest
from innkeeper.control.build_log import BuildLog
from innkeeper.control.host_table import HostEntry
from innkeeper.core.build_context import ContextEntry, ContextError, content_digest, select, takes_one_file
from innkeeper.core.build_plan import SCRATCH, BuildPlan, StagePlan
from innkeeper.core.build_step import CopyStep, DirectoryStep, NoteStep, RunStep, Step, key_material
from innkeeper.core.build_verbs import ExportStep, FindSteps, ScratchImage
from innkeeper.core.dockerfile import DockerfileError
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.isolation import Offer
from innkeeper.errors import (
    ConflictError,
    FileMissingError,
    ForbiddenError,
    GuestError,
    InstanceFailedError,
    InstanceNotFoundError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)

if TYPE_CHECKING:
    from innkeeper.control.context import Control

HOST_SECONDS = 60.0
# A change of what a key means, or of how a step is carried out, makes every kept step unknown.
KEY_VERSION = 1
TAIL_LINES = 20
TAIL_CHARACTERS = 2_000
SUMMARY_CHARACTERS = 500


# Errors of a step that its line has to be told with.
_AT_FAULT = (
    InvalidRequestError,
    FileMissingError,
    ForbiddenError,
    ConflictError,
    GuestError,
    InstanceFailedError,
    InstanceNotFoundError,
)


class StepFailed(Exception):  # noqa: N818  # reads as a sentence where it is raised
    """A step failed; the message names it, with its line where a Dockerfile has it, and ends with what it said last."""


@dataclass(frozen=True, slots=True)
class BuildJob:
    """What is to be built, everything looked up. `digests` are those of the images that the plan names; `context` is the tar file, where there is one."""

    build_id: UUID
    organization_id: UUID
    plan: BuildPlan
    digests: Mapping[str, str]
    context: Path | None
    egress_mode: str
    use_cache: bool


@dataclass(frozen=True, slots=True)
class _State:
    """A file system: an image, and the kept step on it."""

    image_digest: str
    key: str | None


@dataclass(frozen=True, slots=True)
class Built:
    """The image's file on the host."""

    digest: str
    size_bytes: int
    files: int


class BuildRun:
    """One build on one host, by one of its drivers."""

    def __init__(self, control: Control, job: BuildJob, *, host: HostEntry, offer: Offer, log: BuildLog) -> None:
        self._control = control
        self._job = job
        self._host = host
        self._offer = offer
        self._log = log
        self._index: dict[str, ContextEntry] = {}
        self._digests = dict(job.digests)
        self._stages = {stage.index: stage for stage in job.plan.stages}
        self._keys: dict[int, list[str | None]] = {}
        self._kept: set[str] = set()
        self._ready: set[int] = set()

    async def run(self, register: Callable[[Built], Any]) -> Built:
        """Build the image and have `register` write it down, before anybody could take its file for unwanted.

        Raises:
            StepFailed, DockerfileError: a step, naming its line.
            InnkeeperError: anything else that a host or an organization's limits say.

        """
        for warning in self._job.plan.warnings:
            self._log.event("note", text=warning)
        if self._job.context is not None:
            self._index = await anyio.to_thread.run_sync(build_files.index_context, self._job.context)
        if any(stage.base == SCRATCH for stage in self._stages.values()):
            empty = await self._make(ScratchImage(), None)
            self._digests[SCRATCH] = empty.digest
        # In a thread: a context may have hundreds of thousands of files, and every COPY goes through all of them.
        await anyio.to_thread.run_sync(self._make_keys)
        async with self._steps_held():
            return await self._build(register)

    async def _build(self, register: Callable[[Built], Any]) -> Built:
        target = self._job.plan.stages[-1]
        await self._bring_about(target)
        state = self._final(target.index)
        began = time.monotonic()
        if state.key is not None:
            self._log.event("note", text="making the image")
            built = await self._make(ExportStep(state.key), register)
        elif target.base == SCRATCH:
            built = await self._make(ScratchImage(), register)
        else:
            # Nothing was added to the image below: it is the same file, with other defaults.
            built = await self._make(ExportStep(image_digest=state.image_digest), register)
        self._log.event("note", text=f"the image is {built.digest[:12]}, made in {time.monotonic() - began:.1f} s")
        return built

    # --- keys ------------------------------------------------------------------------------------------------------

    def _base(self, stage: StagePlan) -> _State:
        if isinstance(stage.base, int):
            return self._final(stage.base)
        return _State(self._digests[stage.base], None)

    def _final(self, index: int) -> _State:
        """What a stage ends in."""
        stage = self._stages[index]
        keys = [key for key in self._keys[index] if key is not None]
        base = self._base(stage)
        return _State(base.image_digest, keys[-1] if keys else base.key)

    def _make_keys(self) -> None:
        for stage in self._job.plan.stages:
            self._keys[stage.index] = self._stage_keys(stage)

    def _stage_keys(self, stage: StagePlan) -> list[str | None]:
        """A key for each step that changes files; None for the others, and for those that would change nothing."""
        base = self._base(stage)
        parent: Any = [
            KEY_VERSION,
            self._job.organization_id.hex,
            self._control.settings.build_disk_mb,
            base.image_digest,
            base.key,
        ]
        keys: list[str | None] = []
        for step in stage.steps:
            if isinstance(step, NoteStep):
                keys.append(None)
                continue
            material = [parent, key_material(step), self._content(step), self._egress(step)]
            encoded = json.dumps(material, sort_keys=True, ensure_ascii=True).encode()
            parent = hashlib.sha256(encoded).hexdigest()
            keys.append(parent)
        return keys

    def _egress(self, step: Step) -> str:
        return self._job.egress_mode if isinstance(step, RunStep) else ""

    def _content(self, step: Step) -> Any:
        """What stands for the files that a step copies."""
        if not isinstance(step, CopyStep):
            return None
        if isinstance(step.origin, int):
            state = self._final(step.origin)
            return [state.image_digest, state.key]
        if isinstance(step.origin, str):
            return self._digests[step.origin]
        if not step.sources:
            return None
        if self._job.context is None:
            raise DockerfileError(step.line, f"{step.sources[0]}: this build was sent without files")
        try:
            return content_digest(select(self._index, step.sources))
        except ContextError as error:
            raise DockerfileError(step.line, str(error)) from None

    @asynccontextmanager
    async def _steps_held(self) -> AsyncIterator[None]:
        """Ask the host which steps are kept, and have it keep those of this build until the end of the block, whatever else is built meanwhile."""
        wanted = tuple(dict.fromkeys(key for keys in self._keys.values() for key in keys if key is not None))
        verb = FindSteps(wanted, hold=True)
        async with self._control.bus.open(self._host.host.id, verb.verb, to_wire(verb)) as call:
            async with asyncio.timeout(HOST_SECONDS):
                head = await anext(aiter(call.events()), None)
            if not isinstance(head, Message):
                raise UnavailableError("The host answered out of turn")
            if self._job.use_cache:
                self._kept = set(head.body["found"])
            yield
            await call.send_end()
            async with asyncio.timeout(HOST_SECONDS):
                await call.result()

    # --- steps -----------------------------------------------------------------------------------------------------

    async def _bring_about(self, stage: StagePlan) -> None:
        """Have what the stage ends in, from the newest step that is kept. Stages whose files nobody needs are not touched."""
        while stage.index not in self._ready:
            keys = self._keys[stage.index]
            last = max((number for number, key in enumerate(keys) if key in self._kept), default=-1)
            missing = [number for number, key in enumerate(keys) if key is not None and number > last]
            if last < 0 and isinstance(stage.base, int):
                await self._bring_about(self._stages[stage.base])
            if not missing:
                self._tell_kept(stage, len(keys))
                self._ready.add(stage.index)
                return
            base = self._base(stage)
            start = _State(base.image_digest, keys[last] if last >= 0 else base.key)
            try:
                await self._run_steps(stage, start, last + 1)
            except _NotKept:
                # Between our question and now it made room for others.
                self._kept.discard(start.key or "")
                if last < 0 and isinstance(stage.base, int):
                    self._ready.discard(stage.base)
                continue
            self._ready.add(stage.index)

    def _tell_kept(self, stage: StagePlan, until: int) -> None:
        for number, step in enumerate(stage.steps[:until]):
            self._control.metrics.build_steps_kept += not isinstance(step, NoteStep)
            self._tell(stage, number, step, kept=not isinstance(step, NoteStep))

    def _tell(self, stage: StagePlan, number: int, step: Step, *, kept: bool) -> None:
        self._log.event(
            "step",
            stage=stage.name or str(stage.index),
            step=number + 1,
            steps=len(stage.steps),
            line=step.line,
            text=step.text[:SUMMARY_CHARACTERS],
            kept=kept,
        )

    async def _run_steps(self, stage: StagePlan, start: _State, first: int) -> None:
        # Before there is a guest that would have to wait for them.
        for step in stage.steps[first:]:
            if isinstance(step, CopyStep) and isinstance(step.origin, int):
                await self._bring_about(self._stages[step.origin])
        async with AsyncExitStack() as guests:
            try:
                guest = await guests.enter_async_context(open_guest(self._control, self._guest_plan(start)))
            except NotFoundError as error:
                if start.key is None:
                    raise
                raise _NotKept from error
            self._tell_kept(stage, first)
            sources: dict[int | str, BuildGuest] = {}
            for number, step in list(enumerate(stage.steps))[first:]:
                key = self._keys[stage.index][number]
                self._tell(stage, number, step, kept=False)
                if key is None:
                    continue
                began = time.monotonic()
                await self._carry_out(step, guest, guests, sources)
                await guest.save(key)
                self._control.metrics.build_steps_run += 1
                self._kept.add(key)
                self._log.event("note", text=f"done in {time.monotonic() - began:.1f} s")

    def _guest_plan(self, state: _State) -> GuestPlan:
        return GuestPlan(
            self._job.build_id,
            self._job.organization_id,
            self._host,
            self._offer,
            state.image_digest,
            state.key,
            self._job.egress_mode,
        )

    async def _carry_out(
        self, step: Step, guest: BuildGuest, guests: AsyncExitStack, sources: dict[int | str, BuildGuest]
    ) -> None:
        try:
            if isinstance(step, RunStep):
                await self._run_step(step, guest)
            elif isinstance(step, DirectoryStep):
                await guest.unpack(build_files.tar_of_texts(()), step.path)
            elif isinstance(step, CopyStep) and step.origin is not None:
                if step.origin not in sources:
                    sources[step.origin] = await self._source(step.origin, guests)
                await self._copy_between(step, sources[step.origin], guest)
            elif isinstance(step, CopyStep):
                await self._copy(step, guest)
        except _AT_FAULT as error:
            if isinstance(error, DockerfileError):
                raise
            raise StepFailed(f"{_named(step)}: {error.message}") from error

    async def _run_step(self, step: RunStep, guest: BuildGuest) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail: deque[str] = deque(maxlen=TAIL_LINES)

        def on_output(data: bytes) -> None:
            text = decoder.decode(data)
            if not text:
                return
            self._log.event("output", data=text)
            first, *others = text.split("\n")
            tail.append((tail.pop() if tail else "") + first[-TAIL_CHARACTERS:])
            tail.extend(line[-TAIL_CHARACTERS:] for line in others)

        code = await guest.run(step, on_output)
        if code != 0:
            said = "\n".join(tail).strip()[-TAIL_CHARACTERS:]
            what = "timed out" if code == 124 else f"exit code {code}"
            raise StepFailed(f"{_named(step)}: {what}" + (f"\n{said}" if said else ""))

    async def _source(self, origin: int | str, guests: AsyncExitStack) -> BuildGuest:
        """A guest of the stage or image that files are copied from."""
        state = self._final(origin) if isinstance(origin, int) else _State(self._digests[origin], None)
        return await guests.enter_async_context(open_guest(self._control, self._guest_plan(state)))

    async def _copy_between(self, step: CopyStep, source: BuildGuest, guest: BuildGuest) -> None:
        paths = tuple("/" + path if path != "." else "/" for path in step.sources)
        async with source.pack(paths) as (single, pieces):
            await guest.unpack(
                pieces,
                step.destination,
                as_file=single and not step.into_directory,
                chown=step.chown,
                mode=step.chmod,
                owners=step.chown is None,
            )

    async def _copy(self, step: CopyStep, guest: BuildGuest) -> None:
        options: dict[str, Any] = {"chown": step.chown, "mode": step.chmod}
        as_file = not step.into_directory
        if step.documents:
            texts = [(name, content.encode("utf-8", "surrogateescape")) for name, content in step.documents]
            await guest.unpack(build_files.tar_of_texts(texts), step.destination, as_file=as_file, **options)
        if not step.sources or self._job.context is None:
            return
        selected = await anyio.to_thread.run_sync(select, self._index, step.sources)
        archives = [one for one in selected if step.extract and one.entry.archive and "/" not in one.name]
        plain = [one for one in selected if not (step.extract and one.entry.archive and "/" not in one.name)]
        if plain or not archives:
            single = as_file and takes_one_file(self._index, step.sources)
            pieces = build_files.tar_of(self._job.context, plain)
            await guest.unpack(pieces, step.destination, as_file=single, **options)
        for one in archives:
            archive = build_files.bytes_of(self._job.context, one.entry)
            await guest.unpack(archive, step.destination, archive=True, owners=step.chown is None, **options)

    # --- the image -------------------------------------------------------------------------------------------------

    async def _make(self, verb: ExportStep | ScratchImage, register: Callable[[Built], Any] | None) -> Built:
        """Have the host make an image, and tell it once it is written down."""
        async with self._control.bus.open(self._host.host.id, verb.verb, to_wire(verb)) as call:
            events: AsyncIterator[Any] = aiter(call.events())
            head = await anext(events, None)
            if not isinstance(head, Message):
                raise UnavailableError("The host answered out of turn")
            built = Built(str(head.body["digest"]), int(head.body["size_bytes"]), int(head.body["files"]))
            if register is not None:
                await register(built)
            await call.send_end()
            await call.result()
        return built


def _named(step: Step) -> str:
    """What an error calls a step; line 0 is that of one which no Dockerfile has."""
    where = f"Dockerfile line {step.line}: " if step.line else ""
    return f"{where}{step.text[:200]}"


class _NotKept(Exception):  # noqa: N818  # a turn of the road, not an error
    """The step to start from is not kept any more."""
