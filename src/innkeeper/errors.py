"""The error tree. Every error has a stable `code`; only `api/` knows HTTP.

The docstring of a class is its default message, so that what a user reads and what the source says stay one thing.
"""

from __future__ import annotations

import inspect
from typing import ClassVar


class InnkeeperError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.getdoc(type(self)) or self.code)

    @property
    def message(self) -> str:
        """What a user may read: no internals, no secrets."""
        return str(self)


class InvalidRequestError(InnkeeperError):
    """The request is not valid."""

    code = "invalid_request"


class UnauthorizedError(InnkeeperError):
    """A valid API token is required."""

    code = "unauthorized"


class ForbiddenError(InnkeeperError):
    """The token's scopes do not allow this."""

    code = "forbidden"


class NotFoundError(InnkeeperError):
    """There is no such object."""

    code = "not_found"


class ProfileNotFoundError(NotFoundError):
    """Profile not found."""

    code = "profile_not_found"


class ImageNotFoundError(NotFoundError):
    """Image not found."""

    code = "image_not_found"


class InstanceNotFoundError(NotFoundError):
    """Instance not found."""

    code = "instance_not_found"


class VmNotFoundError(NotFoundError):
    """VM not found."""

    code = "vm_not_found"


class SessionNotFoundError(NotFoundError):
    """Session not found."""

    code = "session_not_found"


class FileMissingError(NotFoundError):
    """File not found."""

    code = "file_not_found"


class ExecutionNotFoundError(NotFoundError):
    """Execution not found."""

    code = "execution_not_found"


class ShareNotFoundError(NotFoundError):
    """Share not found."""

    code = "share_not_found"


class CheckpointNotFoundError(NotFoundError):
    """Checkpoint not found."""

    code = "checkpoint_not_found"


class VolumeNotFoundError(NotFoundError):
    """Volume not found."""

    code = "volume_not_found"


class SnapshotNotFoundError(NotFoundError):
    """Snapshot not found."""

    code = "snapshot_not_found"


class TerminalNotFoundError(NotFoundError):
    """Terminal not found."""

    code = "terminal_not_found"


class HostMismatchError(InnkeeperError):
    """The room lives on another host."""

    code = "host_mismatch"


class ConflictError(InnkeeperError):
    """The object is in use or exists already."""

    code = "conflict"


class CheckpointFailedError(ConflictError):
    """The checkpoint could not be taken; the instance runs on."""

    code = "checkpoint_failed"


class SnapshotDamagedError(ConflictError):
    """The snapshot is damaged."""

    code = "snapshot_damaged"


class GuestWrittenError(ConflictError):
    """A virtual machine has written this disk: only virtual machines can use it from then on."""

    code = "guest_written"


class VolumeFailedError(ConflictError):
    """The volume could not be attached or detached; it is as it was."""

    code = "volume_failed"


class VolumeInUseError(ConflictError):
    """The volume is in use."""

    code = "volume_in_use"


class MemoryUnusableError(ConflictError):
    """The memory of the checkpoint cannot be used on this host any more; its disk can."""

    code = "memory_unusable"


class CheckpointDamagedError(MemoryUnusableError):
    """What was saved is damaged."""

    code = "checkpoint_damaged"


class InstanceSuspendedError(ConflictError):
    """The instance is suspended; resume it to go on."""

    code = "instance_suspended"


class NotHereError(InnkeeperError):
    """This is not part of this server."""

    code = "not_implemented"


class PayloadTooLargeError(InnkeeperError):
    """The payload is too large."""

    code = "payload_too_large"


class RateLimitedError(InnkeeperError):
    """Too many requests, or a limit of the organization is reached."""

    code = "rate_limited"

    def __init__(self, message: str | None = None, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(InnkeeperError):
    """The service cannot do this right now."""

    code = "service_unavailable"

    def __init__(self, message: str | None = None, *, retry_after_seconds: int = 2) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class NoHostError(UnavailableError):
    """No available hosts for instance provisioning"""


class HostDrainingError(NoHostError):
    """The host is being drained and takes nothing new"""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, retry_after_seconds=30)


class DriverNotOfferedError(NoHostError):
    """No host offers a driver that isolates as it is asked for"""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, retry_after_seconds=30)


class InstanceNotReadyError(UnavailableError):
    """Instance is still provisioning"""

    code = "instance_not_ready"


class ProvisioningTimeoutError(InstanceNotReadyError):
    """Provisioning timed out; the VM goes on coming up."""

    code = "provisioning_timeout"


class InstanceFailedError(UnavailableError):
    """The instance failed; the next request for the room restarts it on its disk."""

    code = "instance_failed"


class GuestError(InnkeeperError):
    """The guest refused or broke the protocol."""

    code = "guest_error"

    def __init__(self, message: str | None = None, *, guest_code: str = "internal") -> None:
        super().__init__(message)
        self.guest_code = guest_code


class PortUnreachableError(GuestError):
    """Nothing listens on this port of the instance."""

    code = "port_unreachable"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, guest_code="unreachable")


class BadAnswerError(GuestError):
    """The server in the instance gave no valid answer."""

    code = "bad_gateway"


class NoAnswerError(GuestError):
    """The server in the instance did not answer in time."""

    code = "gateway_timeout"


class LinkLostError(GuestError):
    """The link to the guest was lost."""

    code = "link_lost"


BY_CODE: dict[str, type[InnkeeperError]] = {}


def _index(cls: type[InnkeeperError]) -> None:
    BY_CODE.setdefault(cls.code, cls)
    for child in cls.__subclasses__():
        _index(child)


_index(InnkeeperError)


def from_code(code: str, message: str) -> InnkeeperError:
    """The typed error for a code that crossed a process border; unknown codes become InnkeeperError."""
    return BY_CODE.get(code, InnkeeperError)(message)
