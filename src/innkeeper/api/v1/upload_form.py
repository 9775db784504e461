"""A form that uploads one file: its fields, and the file as it streams in."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from innkeeper.api.multipart import PartBegin, PartData, PartEnd, PartEvent
from innkeeper.errors import InvalidRequestError

FIELD_BYTES_MAX = 8_192
# A client may send the file before it says where it goes: so much of it is kept until it does.
EARLY_BYTES_MAX = 1 << 20


class UploadForm:
    """The parts of an upload: fields as they come, then the file as a stream; what follows it is read before the stream ends."""

    def __init__(self, events: AsyncIterator[PartEvent], *, fields: frozenset[str], needed: tuple[str, ...]) -> None:
        self._events = events
        self._known = fields
        self._needed = needed
        self._fields: dict[str, str] = {}
        self._early: list[bytes] | None = None
        self._file_is_whole = False
        self.filename: str | None = None
        self._began = False

    async def begin(self) -> None:
        """Read up to the file's content; where that comes before the fields, and is small, all of the body. Raises InvalidRequestError."""
        while not self._began or self._early is not None:
            event = await anext(self._events, None)
            if event is None:
                break
            assert isinstance(event, PartBegin)  # noqa: S101
            if event.name != "file" or self._began:
                await self._field(event)
                continue
            self._began, self.filename = True, event.filename
            if not self._fields.keys() >= set(self._needed):
                await self._keep_file()
        for name in self._needed:
            if name not in self._fields:
                raise InvalidRequestError(f"{name}: Field required")
        if not self._began:
            raise InvalidRequestError("file: Field required")

    def text(self, name: str) -> str:
        """A field's value."""
        return self._fields[name]

    def flag(self, name: str) -> bool:
        """A field that is true or, if it is not given, false. Raises InvalidRequestError for what is neither."""
        value = self._fields.get(name, "false").lower()
        if value not in ("true", "false"):
            raise InvalidRequestError(f"{name}: must be true or false")
        return value == "true"

    def own_name(self, field: str) -> bytes:
        """The file's own name, for a directory that takes it in. Raises InvalidRequestError, naming the field that names a directory."""
        # The client's path of the file, perhaps of another system.
        name = re.split(r"[/\\]", self.filename or "")[-1].encode("utf-8", "surrogateescape")
        if name in (b"", b".", b".."):
            raise InvalidRequestError(f"{field}: names a directory, and the file has no name")
        return name

    async def content(self) -> AsyncIterator[bytes]:
        """The file's bytes. Ends only when the whole body was read and makes sense."""
        for data in self._early or ():
            yield data
        while not self._file_is_whole:
            event = await anext(self._events)
            if isinstance(event, PartData):
                yield event.data
            self._file_is_whole = isinstance(event, PartEnd)
        async for event in self._events:
            assert isinstance(event, PartBegin)  # noqa: S101
            if event.name in self._known and event.name not in self._fields:
                raise InvalidRequestError(f"{event.name}: must come before file")
            await self._field(event)

    async def _keep_file(self) -> None:
        self._early, size = [], 0
        while isinstance(event := await anext(self._events), PartData):
            size += len(event.data)
            if size > EARLY_BYTES_MAX:
                raise InvalidRequestError(
                    f"file: {' and '.join(self._needed)} must come before a file of more than 1 MiB"
                )
            self._early.append(event.data)
        self._file_is_whole = True

    async def _field(self, begin: PartBegin) -> None:
        if begin.name == "file":
            raise InvalidRequestError("file: given twice")
        value = b""
        while isinstance(event := await anext(self._events), PartData):
            value += event.data
            if len(value) > FIELD_BYTES_MAX:
                raise InvalidRequestError(f"{begin.name[:100]}: at most {FIELD_BYTES_MAX} bytes")
        if begin.name not in self._known:
            return
        if begin.name in self._fields:
            raise InvalidRequestError(f"{begin.name}: given twice")
        try:
            self._fields[begin.name] = value.decode()
        except UnicodeDecodeError:
            raise InvalidRequestError(f"{begin.name}: must be UTF-8") from None
