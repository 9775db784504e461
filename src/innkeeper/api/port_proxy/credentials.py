"""What of a request is ours, so that no guest gets to see it: tokens in any field or query parameter, the cookie and the parameter of signed links."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from innkeeper.api.port_proxy.fields import Fields
from innkeeper.core.token import TOKEN_PATTERN

COOKIE = "inn_share"
LINK_PARAMETER = "inn_link"
_TOKEN = re.compile(TOKEN_PATTERN.encode())


def without_credentials(fields: Fields) -> Fields:
    """The fields without what is ours; a cookie that is not stays. Also the address of the page that a request comes from, if that has a link's signature."""
    kept: Fields = []
    for name, value in fields:
        if name == b"cookie":
            crumbs = [crumb for crumb in value.split(b";") if not _is_ours(crumb)]
            if any(crumb.strip() for crumb in crumbs):
                kept.append((name, b";".join(crumbs).strip()))
        elif not _TOKEN.search(value) and f"{LINK_PARAMETER}=".encode() not in value:
            kept.append((name, value))
    return kept


def _is_ours(crumb: bytes) -> bool:
    return crumb.partition(b"=")[0].strip() == COOKIE.encode() or _TOKEN.search(crumb) is not None


def query_without_credentials(query: bytes) -> bytes:
    """The query string without link signatures and tokens; what stays is as it came."""
    kept = [part for part in query.split(b"&") if not _gives_away(part)]
    return b"&".join(kept)


def _gives_away(part: bytes) -> bool:
    plain = unquote_to_bytes(part.replace(b"+", b" "))
    return plain.partition(b"=")[0].strip() == LINK_PARAMETER.encode() or _TOKEN.search(plain) is not None


def tokens_of(fields: Fields) -> list[str]:
    """The tokens of ours that the request has as such; the guest's server may have credentials of its own in the same places."""
    found = []
    for name, value in fields:
        text = value.strip()
        if name == b"authorization":
            scheme, _, text = text.partition(b" ")
            text = text.strip() if scheme.lower() == b"bearer" else b""
        elif name != b"x-api-key":
            continue
        if _TOKEN.fullmatch(text):
            found.append(text.decode())
    return found[:2]


def cookie_values(fields: Fields) -> list[str]:
    """What the request has as our cookie; a page of another origin may have added some."""
    return [
        crumb.partition(b"=")[2].strip().decode("latin-1")
        for name, value in fields
        if name == b"cookie"
        for crumb in value.split(b";")
        if crumb.partition(b"=")[0].strip() == COOKIE.encode()
    ]
