"""Profiles and the list of their rooms: our own additions to the dialect."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from innkeeper.api.dialects.gentility.schemas import (
    ProfileAnswer,
    ProfileCreate,
    ProfileUpdate,
    RoomSummary,
    show_state,
)
from innkeeper.api.every_room import every_room
from innkeeper.api.json_app import CurrentPrincipal, PathUuid
from innkeeper.control import profiles
from innkeeper.control.context import Control
from innkeeper.control.profiles import ProfileView


def show_profile(view: ProfileView) -> ProfileAnswer:
    """The wire form: names of variables, never their values."""
    profile = view.profile
    return ProfileAnswer(
        id=profile.id,
        name=profile.name,
        image=profile.image,
        vcpu_count=profile.vcpu_count,
        memory_mb=profile.memory_mb,
        disk_mb=profile.disk_mb,
        env=sorted(view.env_names),
        user=profile.user,
        workdir=profile.workdir,
        egress_policy=profile.egress_policy.as_dict(),
        driver=profile.driver,
        min_isolation=profile.min_isolation,
        warm_pool_size=profile.warm_pool_size,
        idle_seconds=profile.idle_seconds,
        command_timeout_seconds=profile.command_timeout_seconds,
        public_files=profile.public_files,
        created_at=profile.created_at,
    )


def build_router(control: Control) -> APIRouter:
    """The routes; each is one use case."""
    router = APIRouter(tags=["profiles"])

    @router.get("/api/profiles")
    async def list_profiles(principal: CurrentPrincipal) -> list[ProfileAnswer]:
        """All profiles of the organization."""
        return [show_profile(profile) for profile in await profiles.list_profiles(control, principal)]

    @router.post("/api/profiles", status_code=201)
    async def create_profile(principal: CurrentPrincipal, body: ProfileCreate) -> ProfileAnswer:
        """Make a profile. 409 `conflict` when the name is taken."""
        return show_profile(await profiles.create(control, principal, _fields(body)))

    @router.get("/api/profile/{profile_id}")
    async def get_profile(principal: CurrentPrincipal, profile_id: PathUuid) -> ProfileAnswer:
        """One profile."""
        return show_profile(await profiles.get(control, principal, profile_id))

    @router.patch("/api/profile/{profile_id}")
    async def update_profile(principal: CurrentPrincipal, profile_id: PathUuid, body: ProfileUpdate) -> ProfileAnswer:
        """Change the fields that are present. Rooms that exist keep what they were made from; the warm pool is drained."""
        return show_profile(await profiles.update(control, principal, profile_id, _fields(body)))

    @router.delete("/api/profile/{profile_id}", status_code=204)
    async def delete_profile(principal: CurrentPrincipal, profile_id: PathUuid) -> Response:
        """Remove a profile. 409 `conflict` while it has rooms."""
        await profiles.delete(control, principal, profile_id)
        return Response(status_code=204)

    @router.get("/api/profile/{profile_id}/rooms")
    async def list_rooms(principal: CurrentPrincipal, profile_id: PathUuid) -> list[RoomSummary]:
        """The rooms of a profile."""
        rooms = await every_room(control, principal, profile_id)
        return [
            RoomSummary(
                room_id=room.room_id,
                instance_id=room.instance.public_id,
                profile_id=profile_id,
                status=show_state(room.instance.state),
                created_at=room.instance.created_at,
                last_active_at=room.instance.last_active_at,
            )
            for room in rooms
        ]

    return router


def _fields(body: ProfileCreate | ProfileUpdate) -> dict[str, Any]:
    return body.model_dump(exclude_unset=True)
