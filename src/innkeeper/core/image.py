"""The image: a read-only root filesystem with its defaults, and the rules of its name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from innkeeper.core.image_config import ImageConfig
from innkeeper.errors import InvalidRequestError

NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?")


class ImageStatus(StrEnum):
    """Where an image is on its way to being usable."""

    MISSING = "missing"
    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"


class ImageSource(StrEnum):
    """Where an image came from: the server's own recipes, a build in a guest, or an OCI image."""

    SHIPPED = "shipped"
    BUILD = "build"
    IMPORT = "import"


@dataclass(frozen=True, slots=True)
class ShippedImage:
    """An image of the server's own recipes as a host reports it. `tools` names what a command can use; digest is "" until it is ready."""

    name: str
    status: ImageStatus
    digest: str = ""
    size_bytes: int = 0
    user: str = "root"
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    built_at: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """A root filesystem under a name. `organization_id` is None for shipped ones, which every organization has.

    `digest` is the SHA-256 of the EROFS file, "" before there is one. An image that is made anew under its name stays usable with the digest and the
    config that it had until the new ones take their place.
    """

    id: UUID
    organization_id: UUID | None
    name: str
    source: ImageSource
    status: ImageStatus
    created_at: datetime
    updated_at: datetime
    digest: str = ""
    size_bytes: int = 0
    source_ref: str | None = None
    last_error: str | None = None
    config: ImageConfig = field(default_factory=ImageConfig)
    tools: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether rooms can be made of it now."""
        return self.digest != ""

    @property
    def defaults(self) -> ImageConfig:
        """What its rooms begin with. In a shipped image that is the home of whichever user the profile names, so no working directory is said."""
        workdir = "" if self.source is ImageSource.SHIPPED else self.config.workdir
        return ImageConfig(user=self.config.user, workdir=workdir, env=self.config.env)


def validate_image_name(name: str, field_name: str = "name") -> None:
    """Check the name of an image.

    Raises:
        InvalidRequestError: naming the field.

    """
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidRequestError(
            f"{field_name}: not the name of an image: 1-63 characters of a-z, 0-9, '.', '_' and '-', with ':' and a tag where there is one"
        )
