"""What an image says about the processes that start from it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

# A name or number, with a group where one is set; Debian's rule for names is narrower than what images use.
IMAGE_USER_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The defaults of an image, as an OCI image has them.

    `user` is a name or number, with `:group` where one is set; `exposed_ports` read `80/tcp`; `entrypoint` and `cmd` are argument lists, empty where
    the image has none.
    """

    user: str = "root"
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)


def config_to_json(config: ImageConfig) -> dict[str, Any]:
    """The configuration as a JSON object."""
    return {
        f.name: list(value) if isinstance(value := getattr(config, f.name), tuple) else value
        for f in dataclasses.fields(config)
    }


def config_from_json(body: dict[str, Any]) -> ImageConfig:
    """The configuration of a JSON object; what a newer server added is ignored, what is missing has its default."""
    known = {f.name for f in dataclasses.fields(ImageConfig)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in body.items() if name in known
    }
    return ImageConfig(**values)
