"""Images as the hosts last reported them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import datetime

import sqlalchemy as sa

from innkeeper.core.image import Image, ImageStatus
from innkeeper.store.tables import images


def report(connection: sa.Connection, reported: Iterable[Image], now: datetime) -> None:
    """Store the images in place of what was known of them."""
    for image in reported:
        values = {
            "status": image.status.value,
            "digest": image.digest,
            "report": dataclasses.asdict(image),
            "reported_at": now,
        }
        done = connection.execute(sa.update(images).where(images.c.name == image.name).values(**values))
        if done.rowcount == 0:
            connection.execute(sa.insert(images).values(name=image.name, **values))


def every(connection: sa.Connection) -> list[Image]:
    """All images, by name."""
    return [image_of(row.report) for row in connection.execute(sa.select(images.c.report).order_by(images.c.name))]


def image_of(report: dict[str, object]) -> Image:
    """The image of a report; what a newer host adds is ignored.

    Raises:
        ValueError: it has no name, or a status that nobody knows.

    """
    known = {f.name for f in dataclasses.fields(Image)}
    values = {key: value for key, value in report.items() if key in known}
    if not values.get("name"):
        raise ValueError("an image without a name")
    values["status"] = ImageStatus(str(values.get("status")))
    tools = values.get("tools")
    values["tools"] = tuple(str(tool) for tool in tools) if isinstance(tools, (list, tuple)) else ()
    return Image(**values)  # type: ignore[arg-type]
