"""VMs under `/v1/vms`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated
from uuid import UUID, uuid5

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse

from innkeeper.api import sse
from innkeeper.api.errors import describe
from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.once import OnceId
from innkeeper.api.ssh.host_key import ssh_host_of
from innkeeper.api.v1.schemas import error_shape
from innkeeper.api.v1.share_form import share_answer
from innkeeper.api.v1.vm_schemas import (
    Staged,
    StageEnv,
    VmBootStep,
    VmClone,
    VmClonedAnswer,
    VMCreateRequest,
    VMCreateResponse,
    VmEventAnswer,
    VmFork,
    VmForkedAnswer,
    VmForksAnswer,
    VmHold,
    VmHost,
    VmIsolation,
    VmRecord,
    VmShape,
    VmUpdate,
)
from innkeeper.api.v1.volume_schemas import VMVolumeMountRequest
from innkeeper.api.v1.volumes import mount_request
from innkeeper.control import forks, session_vm, sessions, shares, suspension, vm_events, vms
from innkeeper.control.context import Control
from innkeeper.control.forks import Forked
from innkeeper.control.silences import with_silences
from innkeeper.control.vm_entry import VmView
from innkeeper.core.egress_policy import parse_limited_policy, show_limited_policy
from innkeeper.core.instance import InstanceState
from innkeeper.core.share import ShareRequest
from innkeeper.core.token import Principal
from innkeeper.core.vm import VmEvent, VmRequest, env_status, show_status
from innkeeper.core.volume import MountRequest
from innkeeper.errors import (
    InnkeeperError,
    InstanceNotReadyError,
    InvalidRequestError,
    ProvisioningTimeoutError,
    SessionNotFoundError,
)
from innkeeper.ids import parse_uuid, uuid7


def add_vm_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""

    @router.post("/v1/vms")
    async def create_vm(
        principal: CurrentPrincipal, body: VMCreateRequest, once: OnceId, wait: bool = True
    ) -> VMCreateResponse:
        """Make a VM, or attach to a session's. 504 `provisioning_timeout` when `wait` is true and it takes too long; it goes on."""
        session = None
        if body.session_id is not None:
            session = await sessions.load(control, principal, session_id(body.session_id))
        wanted = None
        if body.share is not None:
            share_id = uuid7() if once is None else uuid5(once, "share")
            wanted = ShareRequest(share_id, body.share.port, body.share.is_public)
        try:
            view = await session_vm.create(
                control, principal, request_of(body), session=session, new_session=once, share=wanted, wait=wait
            )
        except InstanceNotReadyError as error:
            raise ProvisioningTimeoutError from error
        share = None
        if wanted is not None:
            entry = await vms.existing_entry(control, principal, view.vm.vm_id)
            share = share_answer(control, entry, await shares.get(control, principal, wanted.id))
        status, error_text = env_status(view.vm, view.instance)
        return VMCreateResponse(
            vm_id=view.vm.vm_id,
            session_id=str(view.vm.session_id),
            status=show_status(view.instance),
            env_status=status,
            env_error=error_text,
            share=share,
        )

    @router.get("/v1/vms")
    async def list_vms(principal: CurrentPrincipal) -> list[VmRecord]:
        """The VMs that live and are not suspended, newest first."""
        views = await _all(control, principal, living_only=True)
        return [vm_record(control, view) for view in views if view.instance.state is not InstanceState.SUSPENDED]

    @router.get("/v1/vms/")
    async def list_all_vms(principal: CurrentPrincipal) -> list[VmRecord]:
        """All VMs that are remembered, ended ones too, newest first."""
        return [vm_record(control, view) for view in await _all(control, principal, living_only=False)]

    @router.get("/v1/vms/{vm_id}")
    async def get_vm(principal: CurrentPrincipal, vm_id: str) -> VmRecord:
        """One VM, living or ended."""
        return vm_record(control, await vms.find(control, principal, vm_id))

    @router.patch("/v1/vms/{vm_id}")
    async def change_vm(principal: CurrentPrincipal, vm_id: str, body: VmUpdate) -> VmRecord:
        """Change what is present. 404 `vm_not_found` for one that has ended."""
        fields = body.model_dump(
            include={
                "memory_mb",
                "metadata",
                "vm_lifetime_seconds",
                "idle_seconds",
                "snapshot_on_terminate",
                "snapshot_name",
                "auto_suspend",
                "auto_resume",
            },
            exclude_unset=True,
        )
        return vm_record(control, await vms.change(control, principal, vm_id, fields))

    @router.delete("/v1/vms/{vm_id}")
    async def delete_vm(principal: CurrentPrincipal, vm_id: str) -> VmRecord:
        """End a VM; answers when its guest is gone. Safe to repeat."""
        return vm_record(control, await vms.delete(control, principal, vm_id))

    @router.post("/v1/vms/{vm_id}/suspend")
    async def suspend_vm(principal: CurrentPrincipal, vm_id: str) -> VmRecord:
        """Keep a VM's memory on its host's disk, and free its processors and memory. 409 `checkpoint_failed` where it cannot be kept; it goes on then."""
        return vm_record(control, await suspension.suspend(control, principal, vm_id))

    @router.post("/v1/vms/{vm_id}/resume")
    async def resume_vm(principal: CurrentPrincipal, vm_id: str, wait: bool = True) -> VmRecord:
        """Go on with a suspended VM, under a new id; older ones go on naming it. 503 where there is no room for it now; it stays suspended."""
        try:
            return vm_record(control, await suspension.resume(control, principal, vm_id, wait=wait))
        except InstanceNotReadyError as error:
            raise ProvisioningTimeoutError from error

    @router.post("/v1/vms/{vm_id}/clone")
    async def clone_vm(
        principal: CurrentPrincipal, vm_id: str, body: VmClone, once: OnceId, wait: bool = True
    ) -> VmClonedAnswer:
        """Make another VM that goes on from where this one is now; both do. 409 `checkpoint_failed` says why it cannot be."""
        found = await _fork(control, principal, vm_id, body, once, count=1, wait=wait)
        (view,) = found.vms
        if isinstance(view, InnkeeperError):
            raise view
        return VmClonedAnswer(
            vm_id=view.vm.vm_id,
            session_id=str(view.vm.session_id),
            status=show_status(view.instance),
            snapshot_id=str(found.snapshot.id) if found.kept else None,
            volumes=[str(one) for one in found.snapshot.volumes],
        )

    @router.post("/v1/vms/{vm_id}/fork")
    async def fork_vm(
        principal: CurrentPrincipal, vm_id: str, body: VmFork, once: OnceId, wait: bool = True
    ) -> VmForksAnswer:
        """The same, `count` times of one moment. Where some do not come up, the answer says so of each; an error where none does."""
        found = await _fork(control, principal, vm_id, body, once, count=body.count, wait=wait)
        return VmForksAnswer(
            vms=[_forked(one) for one in found.vms],
            snapshot_id=str(found.snapshot.id) if found.kept else None,
            volumes=[str(one) for one in found.snapshot.volumes],
        )

    @router.post("/v1/vms/{vm_id}/hold")
    async def hold_vm(principal: CurrentPrincipal, vm_id: str, body: VmHold) -> VmRecord:
        """Keep a VM for so many seconds more: its end moves there if it is nearer, and it is not idle until then."""
        return vm_record(control, await vms.hold(control, principal, vm_id, body.seconds, body.reason))

    @router.post("/v1/vms/{vm_id}/stage-env")
    async def stage_env(principal: CurrentPrincipal, vm_id: str, body: StageEnv) -> Staged:
        """Give variables to what is begun in the VM from now on. They are kept in memory alone, until the server restarts."""
        env = {entry.env_name: entry.value for entry in body.entries}
        await vms.stage_env(control, principal, vm_id, env, field="entries")
        return Staged(status="ok", staged=sorted(env))

    @router.get("/v1/vms/{vm_id}/events")
    async def list_vm_events(
        principal: CurrentPrincipal,
        vm_id: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=vm_events.PAGE_MAX)] = vm_events.PAGE_MAX,
    ) -> list[VmEventAnswer]:
        """What happened to the VM, and what is announced, oldest first; `after` is the id of the last event that is known."""
        known = _event_id("after", after)
        events = await vm_events.list_events(control, principal, vm_id, after=known, limit=limit)
        return [_event(one) for one in events]

    @router.get(
        "/v1/vms/{vm_id}/events/stream", response_class=StreamingResponse, responses={200: {"content": sse.CONTENT}}
    )
    async def stream_vm_events(
        principal: CurrentPrincipal,
        vm_id: str,
        after: str | None = None,
        last_event_id: Annotated[str | None, Header(max_length=40)] = None,
    ) -> Response:
        """The same as server-sent events as they happen, each by its type, and at last `end`, when the VM is no more.

        It begins with the VM's first event, or after the one that a client saw last.
        """
        known = _event_id("after", after) if last_event_id is None else _event_id("Last-Event-ID", last_event_id)
        events = await vm_events.follow(control, principal, vm_id, after=known)
        return sse.EventStream(_frames(control, principal, vm_id, events))


async def _fork(
    control: Control, principal: Principal, vm_id: str, body: VmClone, once: UUID | None, *, count: int, wait: bool
) -> Forked:
    sessions = None if once is None else [uuid5(once, str(number)) for number in range(count)]
    try:
        return await forks.fork(
            control,
            principal,
            vm_id,
            count=count,
            snapshot_name=body.snapshot_name,
            wait=wait,
            new_sessions=sessions,
        )
    except InstanceNotReadyError as error:
        raise ProvisioningTimeoutError from error


def _forked(one: VmView | InnkeeperError) -> VmForkedAnswer:
    if isinstance(one, InnkeeperError):
        return VmForkedAnswer(vm_id=None, session_id=None, status="error", error=one.message)
    return VmForkedAnswer(
        vm_id=one.vm.vm_id, session_id=str(one.vm.session_id), status=show_status(one.instance), error=None
    )


def request_of(body: VmShape) -> VmRequest:
    """The use case's form of a body. Raises InvalidRequestError."""
    return VmRequest(
        vm_lifetime_seconds=body.vm_lifetime_seconds,
        memory_mb=body.memory_mb,
        vcpu_count=body.vcpu_count,
        metadata=body.metadata,
        env=body.env,
        image_variant=getattr(body, "image_variant", None),
        idle_seconds=getattr(body, "idle_seconds", None),
        egress_policy=None
        if (policy := getattr(body, "egress_policy", None)) is None
        else parse_limited_policy(policy),
        driver=getattr(body, "driver", None),
        min_isolation=getattr(body, "min_isolation", None),
        snapshot_id=getattr(body, "snapshot_id", None),
        snapshot_on_terminate=getattr(body, "snapshot_on_terminate", None),
        snapshot_name=getattr(body, "snapshot_name", None),
        auto_suspend=getattr(body, "auto_suspend", None),
        auto_resume=getattr(body, "auto_resume", None),
        volumes=None if (wanted := getattr(body, "volumes", None)) is None else _mount_requests(wanted),
    )


def _mount_requests(wanted: Sequence[VMVolumeMountRequest]) -> tuple[MountRequest, ...]:
    found = []
    for number, one in enumerate(wanted):
        try:
            found.append(mount_request(one))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"volumes.{number}.{error.message}") from error
    return tuple(found)


def session_id(text: str) -> UUID:
    """The id of a session. Raises SessionNotFoundError for what is none."""
    value = parse_uuid(text)
    if value is None:
        raise SessionNotFoundError
    return value


def vm_record(control: Control, view: VmView) -> VmRecord:
    """The wire form of a VM."""
    vm, instance = view.vm, view.instance
    status, env_error = env_status(vm, instance)
    return VmRecord(
        vm_id=vm.vm_id,
        session_id=str(vm.session_id),
        status=show_status(instance),
        created_at=instance.created_at,
        expires_at=vm.expires_at,
        last_active_at=instance.last_active_at,
        ended_at=vm.ended_at,
        end_reason=vm.end_reason,
        error=instance.failure,
        vm_lifetime_seconds=vm.lifetime_seconds,
        memory_mb=instance.memory_mb,
        next_memory_mb=vm.memory_mb,
        vcpu_count=instance.vcpu_count,
        disk_mb=instance.disk_mb,
        metadata=vm.metadata,
        image=instance.image,
        image_variant=vm.image_variant,
        image_digest=instance.image_digest,
        idle_seconds=vm.idle_seconds,
        egress_policy=show_limited_policy(vm.egress_policy),
        driver=vm.wish.driver,
        min_isolation=vm.wish.min_isolation,
        hold_until=vm.hold_until,
        hold_reason=vm.hold_reason,
        auto_suspend=vm.auto_suspend,
        auto_resume=vm.auto_resume,
        suspend_reason=vm.suspend_reason,
        woken_by=vm.woken_by,
        env_status=status,
        env_error=env_error,
        snapshot_id=None if vm.snapshot_id is None else str(vm.snapshot_id),
        restored=vm.restored,
        snapshot_on_terminate=vm.snapshot_on_terminate,
        snapshot_name=vm.snapshot_name,
        isolation=None if instance.isolation is None else VmIsolation(**asdict(instance.isolation)),
        boot_trace=[VmBootStep(step=step.step, at_ms=step.at_ms) for step in instance.boot_trace],
        host=None if view.host is None else VmHost(id=str(view.host.id), name=view.host.name),
        ssh_host=ssh_host_of(control.settings),
    )


def _event_id(name: str, text: str | None) -> UUID | None:
    value = None if text is None else parse_uuid(text)
    if value is None and text is not None:
        raise InvalidRequestError(f"{name}: not the id of an event")
    return value


def _event(one: VmEvent) -> VmEventAnswer:
    return VmEventAnswer(id=str(one.id), at=one.at, type=one.type, reason=one.reason, details=one.details)


async def _frames(
    control: Control, principal: Principal, vm_id: str, events: AsyncIterator[VmEvent]
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(with_silences(events)) as told:
            async for event in told:
                yield (
                    sse.PING
                    if event is None
                    else sse.frame(event.type, _event(event).model_dump(mode="json"), event_id=str(event.id))
                )
        view = await vms.find(control, principal, vm_id)
        yield sse.frame("end", {"vm_id": vm_id, "end_reason": view.vm.end_reason})
    except Exception as error:
        # The status line is gone: the error travels as an event.
        _, code, message, _ = describe(error)
        yield sse.frame("error", error_shape(code, message))


async def _all(control: Control, principal: Principal, *, living_only: bool) -> list[VmView]:
    found: list[VmView] = []
    before: UUID | None = None
    while True:
        page = await vms.list_vms(control, principal, living_only=living_only, before=before)
        found += page
        # A page leaves out what is being destroyed, so only an empty one is surely the last.
        if not page:
            return found
        before = page[-1].vm.instance_id
