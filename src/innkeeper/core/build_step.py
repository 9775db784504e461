"""A step of an image build, with every variable replaced: what the guest is told to do, and what a kept result is found by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RunStep:
    """A process in the guest."""

    line: int
    text: str
    argv: tuple[str, ...]
    env: dict[str, str]
    user: str
    workdir: str
    stdin: str | None = None


@dataclass(frozen=True, slots=True)
class CopyStep:
    """Files into the guest: of the context (`origin` None), of an earlier stage (its index), of an image (its name), or written in the Dockerfile.

    `into_directory`: the destination is a directory; otherwise a single file may take that name. `extract`: archives are unpacked (ADD).
    """

    line: int
    text: str
    sources: tuple[str, ...]
    destination: str
    into_directory: bool
    origin: int | str | None = None
    documents: tuple[tuple[str, str], ...] = ()
    chown: str | None = None
    chmod: int | None = None
    extract: bool = False


@dataclass(frozen=True, slots=True)
class DirectoryStep:
    """A directory that WORKDIR makes where it is missing."""

    line: int
    text: str
    path: str


@dataclass(frozen=True, slots=True)
class NoteStep:
    """An instruction that changes the configuration alone: nothing runs, and no cached step depends on it."""

    line: int
    text: str


Step = RunStep | CopyStep | DirectoryStep | NoteStep


def key_material(step: Step) -> dict[str, Any]:
    """What a step's result depends on, beside what came before and the content of files: JSON without line numbers."""
    body = {f.name: getattr(step, f.name) for f in dataclasses.fields(step) if f.name not in ("line", "text")}
    return {"kind": type(step).__name__, **body}
