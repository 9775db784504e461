"""A client's request as the guest is to get it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from starlette.types import Scope

from innkeeper.api.body import header_values
from innkeeper.api.port_proxy.credentials import query_without_credentials, without_credentials
from innkeeper.api.port_proxy.fields import HOP_BY_HOP, Fields, connection_options, is_field, render
from innkeeper.api.raw_connection import TAKE_OVER
from innkeeper.errors import InvalidRequestError

_TARGET = re.compile(rb"/[\x21-\x7e]*")
_METHOD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
# Fields that only we may set, however they are spelled: servers that make variables of field names take `_` for `-`.
_OURS = re.compile(
    rb"x[-_]forwarded[-_].*|forwarded|x[-_]real[-_]ip|x[-_]http[-_]method[-_]override|content[-_]length|host|expect"
)


class Framing(Enum):
    """How the end of a body is told."""

    NONE = 0
    LENGTH = 1
    CHUNKED = 2


@dataclass(frozen=True, slots=True)
class GuestRequest:
    """The head as bytes, how the body is to be sent, the protocol that is asked for, and whether the client waits for a word before its body."""

    head: bytes
    framing: Framing
    upgrade: bytes | None
    expects_continue: bool


def guest_request(scope: Scope, path: bytes, *, drop: frozenset[bytes] = frozenset()) -> GuestRequest:
    """The request for `path` (undecoded), without our credentials, what belongs to the client's connection only, and the fields named `drop`.

    Raises:
        InvalidRequestError: it can be read in two ways, or not be written.

    """
    fields: Fields = scope["headers"]
    framing, length = _framing(scope)
    options = connection_options(fields)
    upgrade = _upgrade(scope, options)
    query = query_without_credentials(scope["query_string"])
    target = path + (b"?" + query if query else b"")
    method = scope["method"]
    if (
        scope["http_version"] not in ("1.0", "1.1")
        or not _TARGET.fullmatch(target)
        or not _METHOD.fullmatch(method)
        or method in ("CONNECT", "TRACE")
    ):
        raise InvalidRequestError("The request line cannot be passed on.")
    hosts = header_values(fields, b"host")
    if len(hosts) != 1:
        raise InvalidRequestError("Host: exactly one is required")
    kept = [(b"host", hosts[0])]
    for name, value in without_credentials(fields):
        if name in HOP_BY_HOP or name in options or name in drop or _OURS.fullmatch(name):
            continue
        if not is_field(name, value):
            raise InvalidRequestError("A header field cannot be passed on.")
        kept.append((name, value))
    client = scope.get("client")
    kept += [
        (b"x-forwarded-for", (client[0] if client else "127.0.0.1").encode()),
        (b"x-forwarded-proto", scope["scheme"].encode()),
        (b"x-forwarded-host", hosts[0]),
    ]
    if framing is Framing.CHUNKED:
        kept.append((b"transfer-encoding", b"chunked"))
    elif length is not None:
        kept.append((b"content-length", length))
    expects = any(value.lower() == b"100-continue" for value in header_values(fields, b"expect"))
    if expects and framing is not Framing.NONE:
        kept.append((b"expect", b"100-continue"))
    if upgrade is None:
        # One request a connection: no answer can be taken for that of another request.
        kept.append((b"connection", b"close"))
    else:
        kept += [(b"connection", b"Upgrade"), (b"upgrade", upgrade)]
    if not all(is_field(name, value) for name, value in kept):
        raise InvalidRequestError("A header field cannot be passed on.")
    return GuestRequest(
        render(b"%b %b HTTP/1.1" % (method.encode(), target), kept),
        framing,
        upgrade,
        expects and framing is not Framing.NONE,
    )


def _framing(scope: Scope) -> tuple[Framing, bytes | None]:
    """How the body comes. The server's parser has refused most of this already; whoever relays must not depend on it."""
    fields = scope["headers"]
    lengths, codings = header_values(fields, b"content-length"), header_values(fields, b"transfer-encoding")
    if codings:
        if lengths or len(codings) > 1 or codings[0].strip().lower() != b"chunked" or scope["http_version"] != "1.1":
            raise InvalidRequestError("Transfer-Encoding: cannot be passed on")
        return Framing.CHUNKED, None
    if not lengths:
        return Framing.NONE, None
    length = lengths[0]
    if len(lengths) > 1 or not length.isdigit() or len(length) > 18:
        raise InvalidRequestError("Content-Length: cannot be passed on")
    return (Framing.LENGTH if int(length) else Framing.NONE), b"%d" % int(length)


def _upgrade(scope: Scope, options: frozenset[bytes]) -> bytes | None:
    wanted = header_values(scope["headers"], b"upgrade")
    # h2c would carry requests that nobody reads here.
    if b"upgrade" not in options or len(wanted) != 1 or TAKE_OVER not in scope or b"h2c" in wanted[0].lower():
        return None
    return wanted[0]
