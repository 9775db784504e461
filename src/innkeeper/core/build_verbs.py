"""What an image build asks of a host daemon beyond `host_verbs`: trees of files in and out of guests, kept steps, the finished image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import UUID


@dataclass(frozen=True, slots=True)
class PackFiles:
    """Read files of a guest as a tar stream, as the guest's root; `sources` are absolute paths or patterns.

    Streams: MESSAGE `{"single": bool}`, then DATA. Answer: `{"files", "bytes"}`. Errors: file_not_found.
    """

    verb: ClassVar[str] = "files.pack"
    instance_id: UUID
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UnpackFiles:
    """Unpack a tar stream in a guest, as its root; see `unpack` of the guest protocol. The opener sends DATA and END.

    Answer: `{"files", "bytes", "skipped"}`. Errors: invalid_request, conflict (the disk is full).
    """

    verb: ClassVar[str] = "files.unpack"
    instance_id: UUID
    destination: str
    as_file: bool = False
    archive: bool = False
    chown: str | None = None
    mode: int | None = None
    owners: bool = False


@dataclass(frozen=True, slots=True)
class SaveStep:
    """End every process of the guest and keep its disk as it is now under a key. Answer: `{"cache_bytes": int}`."""

    verb: ClassVar[str] = "build.save"
    instance_id: UUID
    key: str


@dataclass(frozen=True, slots=True)
class FindSteps:
    """Which of the keys are kept, and can be used. Counts as use of those that are. Answer: `{"found": [key]}`.

    With `hold` the same comes as a MESSAGE first; until the opener sends END, or is gone, no step of these keys is removed, nor one that is kept meanwhile.
    """

    verb: ClassVar[str] = "build.find"
    keys: tuple[str, ...]
    hold: bool = False


@dataclass(frozen=True, slots=True)
class ExportStep:
    """Make an image of a kept step; or with `image_digest` alone take that image as it is.

    Streams: MESSAGE `{"digest", "size_bytes", "files"}`; then the opener writes down that it wants the file and sends END: until then nothing collects it.
    Answer: the same again. Errors: not_found (it is not kept any more), payload_too_large (more bytes or files than an image may have).
    """

    verb: ClassVar[str] = "build.export"
    key: str | None = None
    image_digest: str | None = None


@dataclass(frozen=True, slots=True)
class ScratchImage:
    """The empty image that FROM scratch stands on. Streams and answers as `ExportStep`."""

    verb: ClassVar[str] = "build.scratch"


@dataclass(frozen=True, slots=True)
class CollectSteps:
    """Remove kept steps: all of them, or those beyond the limit and on images that are gone. Those that are held stay.

    Answer: `{"removed": int, "freed_bytes": int, "cache_bytes": int}`.
    """

    verb: ClassVar[str] = "build.collect"
    everything: bool = False


VERBS: tuple[type[Any], ...] = (
    PackFiles,
    UnpackFiles,
    SaveStep,
    FindSteps,
    ExportStep,
    ScratchImage,
    CollectSteps,
)
