"""What an instance is made and run with, whatever its handle is: a room's comes from its profile."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from uuid import UUID

from innkeeper.core.egress_policy import EgressPolicy
from innkeeper.core.isolation import Wish
from innkeeper.core.profile import Profile


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """Image, size, environment and policies of an instance.

    `env_sealed` is a JSON object, bound to `organization_id` and `owner_id`. `pool` names those whose warm guests may serve it.
    """

    organization_id: UUID
    owner_id: UUID
    name: str
    image: str
    vcpu_count: int
    memory_mb: int
    disk_mb: int
    user: str | None
    workdir: str | None
    egress_policy: EgressPolicy
    wish: Wish
    idle_seconds: int | None
    command_timeout_seconds: int
    public_files: str
    pool: tuple[str | int, ...]
    env_sealed: bytes | None = field(default=None, repr=False)


def spec_of_profile(profile: Profile, env_sealed: bytes | None = None) -> InstanceSpec:
    """What the profile's rooms are made and run with."""
    return InstanceSpec(
        organization_id=profile.organization_id,
        owner_id=profile.id,
        name=profile.name,
        image=profile.image,
        vcpu_count=profile.vcpu_count,
        memory_mb=profile.memory_mb,
        disk_mb=profile.disk_mb,
        user=profile.user,
        workdir=profile.workdir,
        egress_policy=profile.egress_policy,
        wish=Wish(profile.driver, profile.min_isolation),
        idle_seconds=profile.idle_seconds,
        command_timeout_seconds=profile.command_timeout_seconds,
        public_files=profile.public_files,
        pool=(str(profile.organization_id), str(profile.id), profile.revision),
        env_sealed=env_sealed,
    )


def pool_shape(spec: InstanceSpec, *, image_digest: str, driver: str, agent_version: str) -> str:
    """The key of the warm pool that serves the spec: equal keys mean interchangeable guests (docs/architecture.md section 5).

    env, user, hostname and DNS come with the claim, so they are not part of it.
    """
    parts = [
        *spec.pool,
        image_digest,
        driver,
        spec.vcpu_count,
        spec.memory_mb,
        spec.disk_mb,
        spec.egress_policy.mode,
        agent_version,
    ]
    if spec.egress_policy.mode == "limited":
        parts += [*spec.egress_policy.ports, *spec.egress_policy.cidrs]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
