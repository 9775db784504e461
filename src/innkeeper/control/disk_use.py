"""What takes the server's space, and whose it is: every file is some organization's or the server's."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa
from pydantic import TypeAdapter

from innkeeper.control.access import require
from innkeeper.control.hosts import stored
from innkeeper.core.host_verbs import MeasureDisk, to_wire
from innkeeper.core.token import Principal, Scope
from innkeeper.store import images, instances, snapshots, volumes

if TYPE_CHECKING:
    from innkeeper.control.context import Control

HOST_SECONDS = 600.0
BLOCK_BYTES = 512
# By the first name below the API's directory; what else there is of the database's.
OF_API = {"builds": "builds", "log": "log"}


@dataclass(frozen=True, slots=True)
class _Measured:
    kind: str
    id: str | None
    size_bytes: int
    own_bytes: int


@dataclass(frozen=True, slots=True)
class DiskUse:
    """What all things of a kind of an organization take; of the server itself where `organization` is None.

    `size_bytes` has blocks that they share with others in it. The `own_bytes` of all rows are what the state directory takes.
    """

    organization: str | None
    kind: str
    count: int
    size_bytes: int
    own_bytes: int


_ITEMS = TypeAdapter(list[_Measured])


async def report(control: Control, principal: Principal, host_id: UUID) -> list[DiskUse]:
    """Whose takes how much, the most first. Only the operator may. Raises NotFoundError; UnavailableError when the host cannot be asked."""
    require(principal, Scope.ADMIN)
    await stored(control, host_id)
    answer = await control.bus.request(host_id, MeasureDisk.verb, to_wire(MeasureDisk()), timeout_seconds=HOST_SECONDS)
    measured = _ITEMS.validate_python(answer["items"])
    measured += await asyncio.to_thread(_of_api, control.settings.api_dir)
    # After the host was asked: what has come to be since is in neither.
    owners = await control.database.read(_owners, host_id)
    found: dict[tuple[str | None, str], list[_Measured]] = {}
    for one in measured:
        organization = control.organizations.get(owners[one.id]) if one.id in owners else None
        found.setdefault((None if organization is None else organization.name, one.kind), []).append(one)
    rows = [
        DiskUse(
            organization,
            kind,
            len(things),
            sum(one.size_bytes for one in things),
            sum(one.own_bytes for one in things),
        )
        for (organization, kind), things in found.items()
    ]
    return sorted(rows, key=lambda one: (-one.own_bytes, one.organization or "", one.kind))


def _owners(connection: sa.Connection, host_id: UUID) -> Mapping[str | None, UUID]:
    """Whose what a host names is. An image that is shipped, or that several organizations have, is the server's."""
    found: dict[str | None, UUID] = {
        str(one): organization for one, organization in instances.organizations_on_host(connection, host_id).items()
    }
    having: dict[str, set[UUID | None]] = {}
    for snapshot in snapshots.on_host(connection, host_id):
        found[str(snapshot.id)] = snapshot.organization_id
        if snapshot.oci_image is not None:
            # It is an image.
            having.setdefault(snapshot.image_digest, set()).add(snapshot.organization_id)
    found.update({str(one.id): one.organization_id for one in volumes.on_host(connection, host_id)})
    for image in images.every(connection):
        having.setdefault(image.digest, set()).add(image.organization_id)
    for digest, organizations in having.items():
        (only, *others) = organizations
        if only is not None and not others:
            found[digest] = only
    return found


def _of_api(directory: Path) -> list[_Measured]:
    sizes: dict[str, int] = {}
    for folder, _, files in os.walk(directory):
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            with suppress(FileNotFoundError):
                top = (*path.relative_to(directory).parts, "")[0]
                kind = OF_API.get(top, "database")
                sizes[kind] = sizes.get(kind, 0) + path.lstat().st_blocks * BLOCK_BYTES
    return [_Measured(kind, None, size, size) for kind, size in sizes.items()]
