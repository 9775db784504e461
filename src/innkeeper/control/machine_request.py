"""What a host is asked for when a warm pool or an instance needs a machine. Pure."""

from __future__ import annotations

import re

from innkeeper.core.host_verbs import EnsureMachine, MachineShape
from innkeeper.core.image import Image
from innkeeper.core.image_config import ImageConfig
from innkeeper.core.instance import Instance
from innkeeper.core.instance_spec import InstanceSpec, pool_shape
from innkeeper.core.isolation import Offer

HOSTNAME_MAX = 63


def shape_of(spec: InstanceSpec, image: Image, *, offer: Offer, agent_version: str) -> MachineShape:
    """The shape of the spec's new guests: what the warm pool keeps ready, and what a new instance asks for."""
    return MachineShape(
        pool_key=pool_shape(spec, image_digest=image.digest, driver=offer.kind, agent_version=agent_version),
        image_digest=image.digest,
        driver=offer.driver,
        vcpu_count=spec.vcpu_count,
        memory_mb=spec.memory_mb,
        disk_mb=spec.disk_mb,
        egress_mode=spec.egress_policy.mode,
        egress_ports=spec.egress_policy.ports,
        egress_cidrs=spec.egress_policy.cidrs,
        user=spec.user or image.config.user,
    )


def ensure_of(
    instance: Instance,
    spec: InstanceSpec,
    image: Image | None,
    env: dict[str, str],
    *,
    offer: Offer,
    agent_version: str,
) -> EnsureMachine:
    """The request that makes the instance's machine ready.

    Its image and size are the ones that it was made with; a pool serves it only while the spec still says the same.
    """
    config = instance.image_config or (ImageConfig() if image is None else image.defaults)
    shape = MachineShape(
        pool_key="",
        image_digest=instance.image_digest,
        driver=offer.driver,
        vcpu_count=instance.vcpu_count,
        memory_mb=instance.memory_mb,
        disk_mb=instance.disk_mb,
        egress_mode=spec.egress_policy.mode,
        egress_ports=spec.egress_policy.ports,
        egress_cidrs=spec.egress_policy.cidrs,
        user=spec.user or config.user,
    )
    if image is not None and image.usable:
        fresh = shape_of(spec, image, offer=offer, agent_version=agent_version)
        same = (fresh.image_digest, fresh.user, fresh.vcpu_count, fresh.memory_mb, fresh.disk_mb) == (
            shape.image_digest,
            shape.user,
            shape.vcpu_count,
            shape.memory_mb,
            shape.disk_mb,
        )
        shape = fresh if same else shape
    return EnsureMachine(
        instance_id=instance.id,
        shape=shape,
        hostname=hostname_of(spec, instance),
        user=spec.user,
        workdir=workdir_of(spec, config),
        env={**config.env, **env},
    )


def workdir_of(spec: InstanceSpec, config: ImageConfig) -> str | None:
    """Where commands begin: what the spec says, else what the image says; None is the user's home."""
    return spec.workdir or config.workdir or None


def hostname_of(spec: InstanceSpec, instance: Instance) -> str:
    """A host name that people recognise: the spec's name and the end of the instance's id."""
    return f"{host_label(spec)}-{instance.id.hex[-8:]}"


def host_label(spec: InstanceSpec) -> str:
    """The spec's name as the beginning of a host name, with room for a suffix of nine characters."""
    return re.sub(r"[^a-z0-9]+", "-", spec.name)[: HOSTNAME_MAX - 9].strip("-") or "room"
