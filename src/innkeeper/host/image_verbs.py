"""The daemon's verb that makes images of OCI images."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from innkeeper.bus.contract import Data, End, Handler, Message, ServerCall
from innkeeper.core.host_verbs import ImportImage
from innkeeper.core.image_config import config_to_json
from innkeeper.core.registry import parse_reference
from innkeeper.errors import InvalidRequestError
from innkeeper.host.disks.oci_import import ImageImporter
from innkeeper.host.disks.oci_job import ImportSource
from innkeeper.host.verbs import bind_handler

ARCHIVES = ("oci-archive", "docker-archive")
CREDENTIAL_CHARACTERS_MAX = 4_096


class ImageVerbs:
    """Translates calls to the importer."""

    def __init__(self, importer: ImageImporter) -> None:
        self._importer = importer

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {ImportImage.verb: bind_handler(ImportImage, self._import)}

    async def _import(self, request: ImportImage, call: ServerCall) -> dict[str, Any]:
        events = call.events()
        source = _source(request, events)
        async with self._importer.importing(source, call.send_message) as made:
            told = {
                "digest": made.digest,
                "size_bytes": made.size_bytes,
                "config": config_to_json(made.config),
                "known": made.known,
            }
            await call.send_message({"made": told})
            # Until it is written down, or the opener is gone, which ends the events too.
            async for event in events:
                if isinstance(event, End):
                    break
        return {}


def _source(request: ImportImage, events: AsyncIterator[Data | Message | End]) -> ImportSource:
    """What is asked for. Raises InvalidRequestError for what no honest control side sends."""
    if request.kind == "registry" and request.reference is not None:
        if max(len(request.username or ""), len(request.password or "")) > CREDENTIAL_CHARACTERS_MAX:
            raise InvalidRequestError("password: too long")
        return ImportSource("registry", parse_reference(request.reference), request.username, request.password)
    if request.kind in ARCHIVES and request.reference is None:
        return ImportSource(request.kind, content=_content(events))
    raise InvalidRequestError(f"kind: registry with a reference, or one of {', '.join(ARCHIVES)}")


async def _content(events: AsyncIterator[Data | Message | End]) -> AsyncIterator[bytes]:
    async for event in events:
        if isinstance(event, Data):
            yield event.data
        elif isinstance(event, Message) and event.body.get("sent"):
            return
        else:
            break
    raise InvalidRequestError("The archive did not arrive whole")
