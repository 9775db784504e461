"""The operator's own certificate authorities, which registries may be behind besides those of the host."""

from __future__ import annotations

import re
import ssl
from pathlib import Path

FILE_BYTES_MAX = 1_048_576
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")


def read_authorities(path: Path) -> bytes:
    """The certificates of a PEM file, and nothing else that may be in it.

    Raises:
        ValueError: it cannot be read, or holds no certificate or a damaged one.

    """
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > FILE_BYTES_MAX:
        raise ValueError(f"{path} has more than {FILE_BYTES_MAX} bytes")
    found = b"\n".join(_CERTIFICATE.findall(content)) + b"\n"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found.decode())
    except (ssl.SSLError, ValueError):
        raise ValueError(f"{path} holds no certificate, or a damaged one") from None
    return found
