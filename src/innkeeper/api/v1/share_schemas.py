"""The wire models of shares and ports: InstaVM's fields, and our own beside them."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from innkeeper.core.share import LINK_SECONDS_DEFAULT, LINK_SECONDS_MAX


class ShareRequest(BaseModel):
    """What is to be published of a VM."""

    model_config = ConfigDict(extra="forbid")

    port: int = Field(ge=1, le=65_535, description="A TCP port in the guest.")
    is_public: bool = Field(False, description="Whether everybody may see it who knows its name.")


class ShareCreate(ShareRequest):
    """Body of POST /v1/shares; of `vm_id` and `session_id` one is enough, and `vm_id` counts where both are there."""

    vm_id: str | None = None
    session_id: str | None = Field(None, description="The VM that this session has now.")


class ShareChange(BaseModel):
    """Body of PATCH /v1/shares/{share_id}: exactly one of the two."""

    model_config = ConfigDict(extra="forbid")

    is_public: bool | None = None
    revoke: Literal[True] | None = Field(None, description="Take the share away for good.")


class ShareAnswer(BaseModel):
    """A published port."""

    share_id: str
    url: str
    port: int
    is_public: bool
    vm_id: str
    session_id: str
    created_at: datetime
    status: str = Field("active", description="`active`, or `revoked` in the answer that says so.")


class LinkCreate(BaseModel):
    """Body of POST /v1/shares/{share_id}/link."""

    model_config = ConfigDict(extra="forbid")

    expires_in_seconds: int = Field(LINK_SECONDS_DEFAULT, ge=1, le=LINK_SECONDS_MAX)


class LinkAnswer(BaseModel):
    """A link that opens a private share to whoever has it."""

    url: str = Field(description="With the signature; it is not shown again.")
    expires_at: datetime


class AppUrl(BaseModel):
    """Where a port of a session's VM is found without a share."""

    url: str = Field(description="Below the API's own address; for programs that send a token.")
    app_url: str = Field(description="The same as `url`.")
    direct_url: str = Field(
        description="A host name of its own; for programs that send a token, and for who opened `link_url`."
    )
    link_url: str = Field(description="The same with a signature, for browsers; it ends with `expires_in_seconds`.")
    vm_ip: str = Field("", description="Empty: nobody but the guest itself reaches a guest's address.")
    port: int
    vm_id: str
    session_id: str
    status: str = Field(description="The VM's.")
    expires_in_seconds: int | None = Field(description="Until the VM ends, or the link if that is sooner.")


class PortAnswer(BaseModel):
    """A TCP port that something in the guest listens on, as the guest tells it."""

    port: int
    address: str
    pid: int | None
    command: str | None
