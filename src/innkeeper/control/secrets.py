"""Secrets at rest: AES-256-GCM, each ciphertext bound to the organization and the object that it belongs to.

Sealed form: key id (4 bytes) · nonce (12) · ciphertext and tag. The key id is a digest of the key, so a sealed value says which key it
needs, and a wrong key is told from a damaged value.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from innkeeper.errors import InnkeeperError
from innkeeper.settings import Settings

KEY_BYTES = 32
KEY_ID_BYTES = 4
NONCE_BYTES = 12
KEY_FILE = "master.key"


class SealedError(InnkeeperError):
    """A stored secret cannot be opened."""


class SecretBox:
    """Seals and opens secrets with one key of 32 bytes."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"the master key must be {KEY_BYTES} bytes")
        self._cipher = AESGCM(key)
        self._digest_key = hashlib.sha256(b"innkeeper digest key" + key).digest()
        self._key_id = hashlib.sha256(b"innkeeper key id" + key).digest()[:KEY_ID_BYTES]
        # Signs what lets its bearer see a private share.
        self.link_key = hmac.digest(key, b"innkeeper share links", hashlib.sha256)

    def seal(self, plain: bytes, *, organization_id: UUID, object_id: UUID) -> bytes:
        """The sealed form; equal secrets look different every time."""
        nonce = os.urandom(NONCE_BYTES)
        return self._key_id + nonce + self._cipher.encrypt(nonce, plain, organization_id.bytes + object_id.bytes)

    def open(self, sealed: bytes, *, organization_id: UUID, object_id: UUID) -> bytes:
        """The secret.

        Raises:
            SealedError: sealed with another key, damaged, or taken from another row.

        """
        key_id, rest = sealed[:KEY_ID_BYTES], sealed[KEY_ID_BYTES:]
        if key_id != self._key_id:
            raise SealedError("A stored secret was sealed with another master key")
        try:
            return self._cipher.decrypt(rest[:NONCE_BYTES], rest[NONCE_BYTES:], organization_id.bytes + object_id.bytes)
        except (InvalidTag, ValueError):
            raise SealedError from None

    def digest(self, data: bytes) -> bytes:
        """32 bytes that are equal for equal data, and tell nothing of it to who has not the key."""
        return hmac.digest(self._digest_key, data, "sha256")

    def seal_env(self, env: dict[str, str], *, organization_id: UUID, object_id: UUID) -> bytes | None:
        """The sealed form of environment variables; None where there are none."""
        if not env:
            return None
        return self.seal(json.dumps(env).encode(), organization_id=organization_id, object_id=object_id)

    def open_env(self, sealed: bytes | None, *, organization_id: UUID, object_id: UUID) -> dict[str, str]:
        """The variables that `seal_env` sealed. Raises SealedError."""
        if sealed is None:
            return {}
        env: dict[str, str] = json.loads(self.open(sealed, organization_id=organization_id, object_id=object_id))
        return env


def load_box(settings: Settings) -> SecretBox:
    """The box of the configured key, else of the key file, which is made (0600) when it is missing.

    Raises:
        ValueError: the key is not base64 of 32 bytes.

    """
    if settings.master_key is not None:
        return SecretBox(_decode(settings.master_key.get_secret_value(), "INNKEEPER_MASTER_KEY"))
    path = settings.api_dir / KEY_FILE
    try:
        # Written beside and linked, so that a crash leaves no half key and two servers that start at once agree on one.
        fresh = path.with_name(f"{KEY_FILE}.{os.getpid()}")
        if not path.exists():
            settings.api_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, base64.b64encode(os.urandom(KEY_BYTES)) + b"\n")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.link(fresh, path)
    except FileExistsError:
        pass
    finally:
        fresh.unlink(missing_ok=True)
    return SecretBox(_decode(path.read_text(), str(path)))


def _decode(text: str, where: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"{where}: not the base64 of a {KEY_BYTES}-byte key")
    return key
