"""Bodies of the endpoints under `/v1/vms/{vm_id}/files`. Paths are spelled as `api/v1/guest_paths.py` says."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class VmFile(_Answer):
    """A name of a directory, or a path that a pattern took."""

    name: str = Field(description="The last name of the path.")
    path: str = Field(description="The whole path.")
    type: str = Field(description="`file`, `dir`, `symlink` or `other`.")
    size: int = Field(description="In bytes.")
    mode: str = Field(description="Octal, such as `0644`.")
    modified_at: datetime = Field(description="When its content changed last.")


class VmFileStat(VmFile):
    """What a path is."""

    uid: int = Field(description="The owner's number.")
    gid: int = Field(description="The group's number.")
    target: str | None = Field(description="Where a symlink points to.")


class VmFilePage(_Answer):
    """A page of a directory."""

    entries: list[VmFile] = Field(description="In order of the names' bytes.")
    next_cursor: str | None = Field(description="Continues; null at the end.")


class VmFilesFound(_Answer):
    """A page of the paths that a pattern took."""

    entries: list[VmFile] = Field(description="In order of the tree; perhaps none although there are more.")
    unreadable: int = Field(description="Directories that the VM's user may not look into.")
    next_cursor: str | None = Field(description="Continues; only null is the end.")


class VmFileMatch(_Answer):
    """A line that was found."""

    path: str = Field(description="The file.")
    line: int = Field(description="From 1.")
    column: int = Field(description="Of the first match, in bytes from 1.")
    text: str = Field(description="The line, or the part of it around the match.")
    cut: bool = Field(description="Whether `text` is a part.")


class VmFileMatches(_Answer):
    """A page of the lines that were found."""

    matches: list[VmFileMatch] = Field(description="Perhaps none although there are more.")
    binary: int = Field(description="Files on this page that are no text, and were passed over.")
    unreadable: int = Field(description="Files and directories that the VM's user may not open.")
    long_lines: int = Field(
        description="Lines of more than 64 KiB, in which a match across the edge of two pieces is not seen."
    )
    next_cursor: str | None = Field(description="Continues; only null is the end.")


class VmFileWritten(_Answer):
    """A file that was written."""

    path: str = Field(description="The whole path.")
    size: int = Field(description="Bytes.")
    created: bool = Field(description="Whether it is new.")


class VmTreeMade(_Answer):
    """What a copy or an archive made."""

    path: str = Field(description="The copy, or the directory that took the archive.")
    files: int = Field(description="Entries, directories included.")
    size: int = Field(description="Bytes in files.")
    skipped: int = Field(description="Sockets, FIFOs and devices, which are left out.")


class VmPath(_Answer):
    """A path that was made, renamed or removed."""

    path: str = Field(description="The whole path, as it is called now.")


class VmMkdir(_Body):
    """Body of POST .../files/mkdir."""

    path: str
    parents: bool = Field(False, description="Make missing parents; no error where the directory exists.")


class VmRename(_Body):
    """Body of POST .../files/rename."""

    path: str
    to: str = Field(description="The new path.")
    replace: bool = Field(False, description="Replace a file that has the name.")


class VmCopy(_Body):
    """Body of POST .../files/copy."""

    path: str
    to: str = Field(description="The copy's path.")
    recursive: bool = Field(False, description="Needed for a directory.")
    replace: bool = Field(False, description="Replace a file that has the name. A directory replaces nothing.")
