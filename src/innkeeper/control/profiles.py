"""Profiles: the templates that rooms are made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.control import audit, clock, placement
from innkeeper.control.access import require, require_any
from innkeeper.control.room_entry import show_profile
from innkeeper.core.egress_policy import EgressPolicy, parse_egress_policy
from innkeeper.core.isolation import Wish
from innkeeper.core.profile import Profile, validate_profile
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import ConflictError, InvalidRequestError, ProfileNotFoundError
from innkeeper.ids import uuid7
from innkeeper.store import audit_events
from innkeeper.store import profiles as store
from innkeeper.store.profiles import StoredProfile

if TYPE_CHECKING:
    from innkeeper.control.context import Control

# What a user may set, and the types that each takes.
FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "image": (str,),
    "vcpu_count": (int,),
    "memory_mb": (int,),
    "disk_mb": (int,),
    "env": (dict, type(None)),
    "user": (str, type(None)),
    "workdir": (str, type(None)),
    "egress_policy": (Mapping, EgressPolicy),
    "driver": (str,),
    "min_isolation": (str,),
    "warm_pool_size": (int,),
    "idle_seconds": (int, type(None)),
    "command_timeout_seconds": (int,),
    "public_files": (str,),
}


@dataclass(frozen=True, slots=True)
class ProfileView:
    """A profile as a caller sees it: `profile.env` is empty, only the names of its variables are told."""

    profile: Profile
    env_names: tuple[str, ...]


async def list_profiles(control: Control, principal: Principal) -> list[ProfileView]:
    """The organization's profiles, oldest first."""
    require_any(principal, Scope.PROFILES, Scope.ROOMS)
    found = await control.database.read(store.of_organization, principal.organization_id)
    return [_view(stored) for stored in found]


async def get(control: Control, principal: Principal, profile_id: UUID) -> ProfileView:
    """One profile. Raises ProfileNotFoundError."""
    require_any(principal, Scope.PROFILES, Scope.ROOMS)
    return _view(await load(control, principal, profile_id))


async def load(control: Control, principal: Principal, profile_id: UUID) -> StoredProfile:
    """The stored profile, from memory where it is there. Raises ProfileNotFoundError, also for another organization's."""
    stored = control.profiles.get(profile_id)
    if stored is None:
        stored = await control.database.read(store.get, profile_id)
        if stored is not None:
            stored = control.profiles.setdefault(profile_id, stored)
    if stored is None or stored.profile.organization_id != principal.organization_id:
        raise ProfileNotFoundError
    return stored


async def create(control: Control, principal: Principal, fields: Mapping[str, Any]) -> ProfileView:
    """A new profile of `fields` (the names in FIELDS; only `name` and `image` are required).

    Raises:
        InvalidRequestError: naming the field; also for an unknown image, and for an isolation that no host can ever give.
        DriverNotOfferedError: no host has such a driver, or isolates so strongly, now.
        ConflictError: the name is taken.

    """
    require(principal, Scope.PROFILES)
    missing = [name for name in ("name", "image") if name not in fields]
    if missing:
        raise InvalidRequestError(f"{missing[0]}: is required")
    empty = Profile(uuid7(), principal.organization_id, "", "", clock.now())
    stored = _changed(control, StoredProfile(empty), fields)

    def insert(connection: sa.Connection) -> None:
        store.insert(connection, stored)
        audit_events.insert(
            connection,
            audit.event(principal, "profile.create", "profile", empty.id, {"name": stored.profile.name}),
        )

    try:
        await control.database.write(insert)
    except sa.exc.IntegrityError as error:
        raise _name_taken(stored) from error
    control.profiles[empty.id] = stored
    control.pools_hint.set()
    return _view(stored)


async def update(control: Control, principal: Principal, profile_id: UUID, changes: Mapping[str, Any]) -> ProfileView:
    """The profile with `changes`: absent fields stay; within `env` a null removes a variable, and `env: null` all of them.

    Rooms that exist keep their image and size; environment, user and working directory reach them at their next start,
    the other policies at once.

    Raises:
        InvalidRequestError, DriverNotOfferedError: as for `create`.
        ConflictError: the name is taken, or someone else changed the profile meanwhile.

    """
    require(principal, Scope.PROFILES)
    before = await load(control, principal, profile_id)
    after = _changed(control, before, changes)
    if after is before:
        return _view(before)

    def change(connection: sa.Connection) -> bool:
        done = store.update(connection, after, from_revision=before.profile.revision)
        if done:
            audit_events.insert(
                connection,
                audit.event(principal, "profile.update", "profile", profile_id, {"fields": ",".join(sorted(changes))}),
            )
        return done

    try:
        done = await control.database.write(change)
    except sa.exc.IntegrityError as error:
        raise _name_taken(after) from error
    if not done:
        control.profiles.pop(profile_id, None)
        raise ConflictError("The profile was changed by someone else meanwhile")
    control.profiles[profile_id] = after
    show_profile(control.live, after)
    control.pools_hint.set()
    return _view(after)


async def delete(control: Control, principal: Principal, profile_id: UUID) -> None:
    """Remove a profile.

    Raises:
        ConflictError: it still has rooms.

    """
    require(principal, Scope.PROFILES)
    await load(control, principal, profile_id)

    def remove(connection: sa.Connection) -> None:
        rooms = store.count_rooms(connection, profile_id)
        if rooms:
            raise ConflictError(f"The profile still has {rooms} room{'s' if rooms > 1 else ''}")
        if store.delete(connection, profile_id):
            audit_events.insert(connection, audit.event(principal, "profile.delete", "profile", profile_id))

    try:
        await control.database.write(remove)
    except sa.exc.IntegrityError as error:
        # A room that another process made at this moment, where the database lets writers meet.
        raise ConflictError("The profile still has rooms") from error
    control.profiles.pop(profile_id, None)
    control.pools_hint.set()


def _open_env(control: Control, stored: StoredProfile) -> dict[str, str]:
    """The variables of a profile with their values."""
    profile = stored.profile
    return control.box.open_env(stored.env_sealed, organization_id=profile.organization_id, object_id=profile.id)


def _changed(control: Control, before: StoredProfile, changes: Mapping[str, Any]) -> StoredProfile:
    """The profile with the changes, checked; `before` itself where nothing is different."""
    for name, value in changes.items():
        kinds = FIELDS.get(name)
        if kinds is None:
            raise InvalidRequestError(f"{name}: there is no such field")
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InvalidRequestError(f"{name}: has the wrong type")
    values = {name: value for name, value in changes.items() if name != "env"}
    policy = values.get("egress_policy")
    if policy is not None and not isinstance(policy, EgressPolicy):
        values["egress_policy"] = parse_egress_policy(policy)
    env_before = _open_env(control, before)
    env = _merged(env_before, changes["env"]) if "env" in changes else env_before
    profile = dataclasses.replace(before.profile, **values)
    if profile == before.profile and env == env_before:
        return before
    validate_profile(dataclasses.replace(profile, env=env))
    _require_supported(control, profile, changes)
    profile = dataclasses.replace(profile, revision=before.profile.revision + 1)
    sealed = control.box.seal_env(env, organization_id=profile.organization_id, object_id=profile.id)
    return StoredProfile(profile, tuple(sorted(env)), sealed)


def _merged(env: dict[str, str], changes: Mapping[Any, Any] | None) -> dict[str, str]:
    if changes is None:
        return {}
    merged = dict(env)
    for name, value in changes.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(name, str) and isinstance(value, str):
            merged[name] = value
        else:
            raise InvalidRequestError("env: names and values must be strings")
    return merged


def _require_supported(control: Control, profile: Profile, changes: Mapping[str, Any]) -> None:
    """Refuse what nothing here can honour: a promise of isolation that is not kept is worse than none."""
    if changes.keys() & {"driver", "min_isolation"}:
        placement.require_offered(control, Wish(profile.driver, profile.min_isolation))
    shipped = {name.strip() for name in control.settings.images.split(",")}
    known = control.images.resolve(profile.organization_id, profile.image)
    if "image" in changes and known is None and profile.image not in shipped:
        raise InvalidRequestError(f"image: there is no image named {profile.image!r}")


def _name_taken(stored: StoredProfile) -> ConflictError:
    return ConflictError(f"There is a profile named {stored.profile.name!r} already")


def _view(stored: StoredProfile) -> ProfileView:
    return ProfileView(stored.profile, stored.env_names)
