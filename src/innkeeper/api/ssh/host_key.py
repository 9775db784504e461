"""The gateway's host key: made once, and kept where only the API process reads it."""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from innkeeper.core.ssh_key import HOST_KEY_FILE, parse_ssh_key
from innkeeper.settings import Settings

ALL_ADDRESSES = ("0.0.0.0", "::")  # noqa: S104 - compared, never listened on


def private_key(directory: Path) -> bytes:
    """The private key as OpenSSH writes it; made where there is none. Raises OSError."""
    path = directory / HOST_KEY_FILE
    try:
        return path.read_bytes()
    except FileNotFoundError:
        made = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    # A key has its name when it is whole on the disk: half of one would keep the gateway from ever starting again.
    draft = path.with_name(f".{HOST_KEY_FILE}-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())
        # Not in place of one that somebody made meanwhile.
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)
    return path.read_bytes()


@dataclass(frozen=True, slots=True)
class SshGateway:
    """Where the gateway listens, the host that clients are told, and what it is known by: kind and base64 of its key, and the fingerprint as ssh shows it."""

    address: str
    port: int
    host: str | None
    host_key: str
    fingerprint: str


def ssh_gateway_of(settings: Settings) -> SshGateway | None:
    """The gateway that the settings ask for; None where they ask for none. Raises OSError, ValueError when its key cannot be read."""
    if not settings.ssh_port:
        return None
    key = load_ssh_private_key(private_key(settings.api_dir), None).public_key()
    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    fingerprint = parse_ssh_key(line, number=0, created_at=datetime.now(UTC)).fingerprint
    return SshGateway(_address(settings), settings.ssh_port, ssh_host_of(settings), line, fingerprint)


def ssh_host_of(settings: Settings) -> str | None:
    """The host that clients are told; None where there is no gateway, or where it listens on all addresses and nobody named one."""
    if not settings.ssh_port:
        return None
    if settings.ssh_host is not None:
        return settings.ssh_host
    address = _address(settings)
    return None if address in ALL_ADDRESSES else address


def _address(settings: Settings) -> str:
    return settings.ssh_listen or settings.listen
