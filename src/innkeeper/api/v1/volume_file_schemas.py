"""The wire models of volumes' files."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class VolumeFile(_Answer):
    """Something in a volume."""

    path: str = Field(description="From the volume's top.")
    name: str = Field(description="The last name of the path.")
    type: str = Field(description="`file`, `dir`, `symlink` or `other`.")
    size: int = Field(description="In bytes.")
    mode: str = Field(description="Octal, such as `0644`.")
    modified_at: datetime = Field(description="When its content changed last.")


class VolumeFileUploaded(_Answer):
    """What became of an upload."""

    status: str = Field(description="`success`.")
    path: str = Field(description="From the volume's top.")
    size: int = Field(description="In bytes.")
    created: bool = Field(description="Whether the file is new.")


class VolumeFileDownload(BaseModel):
    """Body of POST /v1/volumes/{volume_id}/files/download."""

    model_config = ConfigDict(extra="forbid")

    path: str


class VolumeFileDownloaded(_Answer):
    """A file as JSON."""

    status: str = Field(description="`success`.")
    path: str = Field(description="From the volume's top.")
    filename: str = Field(description="The last name of the path.")
    size: int = Field(description="In bytes.")
    content: str = Field(description="The file as base64.")


class VolumeFileDeleted(_Answer):
    """What was deleted."""

    status: str = Field(description="`deleted`.")
    path: str = Field(description="From the volume's top.")
