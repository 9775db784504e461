"""Warm pools: which ready guests the hosts should keep for whom."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from innkeeper.control.machine_request import host_label, shape_of, workdir_of
from innkeeper.control.placement import rules_of
from innkeeper.control.tasks import wait_for_hint
from innkeeper.control.vm_shape import VM_POOL, new_spec, standard_image
from innkeeper.core.host_verbs import SetPools, WarmPool, to_wire
from innkeeper.core.instance_spec import spec_of_profile
from innkeeper.core.isolation import Rules, Wish, choose
from innkeeper.core.profile import Profile
from innkeeper.errors import InnkeeperError

if TYPE_CHECKING:
    from innkeeper.control.context import Control
    from innkeeper.control.host_table import HostEntry
    from innkeeper.control.live_table import Entry

log = structlog.get_logger(__name__)

POLL_SECONDS = 300.0
HOST_SECONDS = 30.0
# A profile of an organization other than the operator's own keeps its pool this long after its last use: many organizations
# with three profiles each that nobody uses must not fill the machine.
USED_SECONDS = 86_400.0


async def step(control: Control) -> None:
    """Wait for a hint or the next poll, then tell every host its pools. Telling the same again changes nothing."""
    await wait_for_hint(control.pools_hint, at_most_seconds=POLL_SECONDS)
    for host in control.hosts:
        if host.host.id not in control.bus.hosts():
            continue
        pools = SetPools(() if host.host.draining else desired(control, host))
        try:
            await control.bus.request(host.host.id, SetPools.verb, to_wire(pools), timeout_seconds=HOST_SECONDS)
        except InnkeeperError as error:
            log.warning("a host could not be told its pools", host_id=str(host.host.id), reason=error.message)


def desired(control: Control, host: HostEntry) -> tuple[WarmPool, ...]:
    """The pools that a host should keep: one per profile that is used and whose image is ready. Several hosts share a size evenly, rounded up."""
    reachable = set(control.bus.hosts())
    hosts = max(1, sum(1 for other in control.hosts if other.host.id in reachable and not other.host.draining))
    pools, rules = [], rules_of(control.settings)
    for stored in control.profiles.values():
        profile = stored.profile
        image = control.images.resolve(profile.organization_id, profile.image)
        spec = spec_of_profile(profile, stored.env_sealed)
        offer = choose(spec.wish, rules, host.offers)
        if (
            profile.warm_pool_size
            and image is not None
            and image.usable
            and offer is not None
            and _used(control, profile)
        ):
            shape = shape_of(spec, image, offer=offer, agent_version=host.agent_version)
            pools.append(
                WarmPool(
                    shape,
                    -(-profile.warm_pool_size // hosts),
                    hostname=host_label(spec),
                    user=profile.user,
                    workdir=workdir_of(spec, image.defaults),
                    env={
                        **image.config.env,
                        **control.box.open_env(
                            stored.env_sealed, organization_id=profile.organization_id, object_id=profile.id
                        ),
                    },
                )
            )
    vm_pool = _vm_pool(control, host, hosts, rules)
    return tuple(pools) if vm_pool is None else (*pools, vm_pool)


def _vm_pool(control: Control, host: HostEntry, hosts: int, rules: Rules) -> WarmPool | None:
    """Guests for VMs of the default shape, while VMs are used."""
    settings, organization_id = control.settings, control.default_organization_id
    used = control.vms_used is not None and time.monotonic() - control.vms_used < USED_SECONDS
    # Only the server's own image is for everybody.
    image = control.images.own(None, standard_image(settings))
    if not (used and settings.vm_pool_size and organization_id and image is not None and image.usable):
        return None
    spec = new_spec(
        organization_id,
        organization_id,
        image=image.name,
        vcpu_count=settings.vm_vcpus,
        memory_mb=settings.vm_memory_mb,
        disk_mb=settings.vm_disk_mb,
        wish=Wish(),
    )
    offer = choose(spec.wish, rules, host.offers)
    if offer is None:
        return None
    return WarmPool(
        shape_of(spec, image, offer=offer, agent_version=host.agent_version),
        -(-settings.vm_pool_size // hosts),
        hostname=host_label(spec),
        user=spec.user,
        workdir=workdir_of(spec, image.defaults),
        env=dict(image.config.env),
        kind="vm",
    )


def _used(control: Control, profile: Profile) -> bool:
    if profile.organization_id == control.default_organization_id:
        return True
    last = control.profile_used.get(profile.id)
    return last is not None and time.monotonic() - last < USED_SECONDS


def note_used(control: Control, entry: Entry) -> None:
    """An instance came up: its pool is used."""
    now = time.monotonic()
    if entry.instance.profile_id in control.profiles:
        if control.profile_used.get(entry.instance.profile_id) is None:
            control.pools_hint.set()
        control.profile_used[entry.instance.profile_id] = now
    elif entry.spec.pool == VM_POOL:
        if control.vms_used is None:
            control.pools_hint.set()
        control.vms_used = now


def note_loaded(control: Control, profile_id: UUID, seconds_ago: float) -> None:
    """A room of the profile was last used that long ago, before this process began."""
    at = time.monotonic() - max(0.0, seconds_ago)
    control.profile_used[profile_id] = max(control.profile_used.get(profile_id, at), at)
