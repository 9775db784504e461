"""Public SSH keys: what one must look like, and its fingerprint."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from datetime import datetime

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from innkeeper.errors import InvalidRequestError

# The gateway's own, private one, in the API process's folder.
HOST_KEY_FILE = "ssh-host-key"
LINE_MAX = 16_384
COMMENT_MAX = 256
RSA_BITS_MIN = 2_048
# What OpenSSH takes today, without DSA; those of security keys are checked by their form alone.
KINDS = frozenset(
    {"ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"}
    | {"sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"}
)


@dataclass(frozen=True, slots=True)
class SshKey:
    """A stored key. `public_key` is kind and base64 without the comment; `fingerprint` is `SHA256:` and base64 without padding, as ssh-keygen -l prints it."""

    number: int
    public_key: str
    fingerprint: str
    comment: str
    created_at: datetime


def parse_ssh_key(line: str, *, number: int, created_at: datetime) -> SshKey:
    """The key of a line of authorized_keys without options.

    Raises:
        InvalidRequestError: naming what is wrong; never repeating the line.

    """
    words = line.strip().split(None, 2)
    if len(line) > LINE_MAX or "\n" in line.strip() or len(words) < 2:
        raise InvalidRequestError("public_key: one line as in a .pub file: kind, base64, comment")
    kind, encoded = words[0], words[1]
    if kind not in KINDS:
        raise InvalidRequestError("public_key: a kind that is not accepted; ssh-ed25519, ssh-rsa and ecdsa-sha2-* are")
    try:
        blob = base64.b64decode(encoded, validate=True)
        if blob[:4] + blob[4 : 4 + len(kind)] != len(kind).to_bytes(4, "big") + kind.encode():
            raise ValueError("of another kind than it says")
        key = load_ssh_public_key(f"{kind} {encoded}".encode()) if not kind.startswith("sk-") else None
    except (binascii.Error, ValueError, UnsupportedAlgorithm):
        raise InvalidRequestError("public_key: not a public key of that kind") from None
    if isinstance(key, RSAPublicKey) and key.key_size < RSA_BITS_MIN:
        raise InvalidRequestError(f"public_key: an RSA key needs at least {RSA_BITS_MIN} bits")
    comment = "".join(c for c in (words[2] if len(words) > 2 else "") if c.isprintable())[:COMMENT_MAX]
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return SshKey(number, f"{kind} {encoded}", f"SHA256:{digest}", comment, created_at)
