"""Of which image, and how large, VMs are made."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from innkeeper.core.egress_policy import EgressPolicy
from innkeeper.core.instance_spec import InstanceSpec
from innkeeper.core.isolation import Wish
from innkeeper.errors import InvalidRequestError
from innkeeper.settings import Settings
from innkeeper.settings_values import comma_separated

if TYPE_CHECKING:
    from innkeeper.control.context import Control

USER = "root"
# Where the dialect's clients expect to work; a guest without it begins in the user's home.
WORKDIR = "/app"
COMMAND_SECONDS = 60
VM_POOL = ("vm",)
STANDARD = "standard"
# Variants that the dialect knows; they are images here only where a setting says which.
KNOWN_VARIANTS = (STANDARD, "computer-use", "nix-dev")
PREFERRED_IMAGE = "python-data-science"


def image_of(control: Control, organization_id: UUID, variant: str | None) -> str:
    """The name of the image that a variant stands for. Raises InvalidRequestError."""
    name = variant or STANDARD
    mapped, shipped = _mapped(control.settings), comma_separated(control.settings.images)
    if name in mapped:
        return mapped[name]
    if name == STANDARD and shipped:
        return standard_image(control.settings)
    if name in KNOWN_VARIANTS or (control.images.resolve(organization_id, name) is None and name not in shipped):
        raise InvalidRequestError(f"image_variant: there is no image for {name[:64]!r} here")
    return name


def standard_image(settings: Settings) -> str:
    """The name of the image of VMs that do not ask for another; "" where the server has none."""
    shipped = comma_separated(settings.images)
    default = PREFERRED_IMAGE if PREFERRED_IMAGE in shipped else next(iter(shipped), "")
    return _mapped(settings).get(STANDARD, default)


def _mapped(settings: Settings) -> dict[str, str]:
    pairs = (text.partition("=") for text in comma_separated(settings.vm_image_variants))
    return {key.strip(): image.strip() for key, _, image in pairs}


def new_spec(
    organization_id: UUID, session_id: UUID, *, image: str, vcpu_count: int, memory_mb: int, disk_mb: int, wish: Wish
) -> InstanceSpec:
    """The spec of a VM of a shape. Guests of VMs have nothing of anybody's before they are claimed, so all organizations share their warm pool."""
    return InstanceSpec(
        organization_id=organization_id,
        owner_id=session_id,
        name="vm",
        image=image,
        vcpu_count=vcpu_count,
        memory_mb=memory_mb,
        disk_mb=disk_mb,
        user=USER,
        workdir=WORKDIR,
        egress_policy=EgressPolicy(),
        wish=wish,
        idle_seconds=None,
        command_timeout_seconds=COMMAND_SECONDS,
        public_files="off",
        pool=VM_POOL,
    )
