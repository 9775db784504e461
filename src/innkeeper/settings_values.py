"""The kinds of values that settings have, where a type and a range do not say it."""

from __future__ import annotations

import base64
import binascii
import re
from ipaddress import IPv4Network, ip_address
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, SecretStr

KEY_BYTES = 32
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL}){{0,8}}(?::[1-9][0-9]{{0,4}})?")
IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


def _joined(value: object) -> object:
    """A list of the settings file as the comma-separated text of a variable."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return value


def _address(value: str) -> str:
    if value != "localhost":
        try:
            ip_address(value)
        except ValueError:
            raise ValueError("an IPv4 or IPv6 address, or localhost") from None
    return value


def _networks(value: str) -> str:
    for text in comma_separated(value):
        try:
            IPv4Network(text)
        except ValueError as error:
            raise ValueError(f"comma-separated IPv4 networks such as 10.1.2.0/24 ({error})") from None
    return value


def _servers(value: str) -> str:
    for text in comma_separated(value):
        host, port = text, "53"
        if text.startswith("["):
            host, _, rest = text[1:].partition("]")
            port = rest.removeprefix(":") or port
        elif text.count(":") == 1:
            host, _, port = text.partition(":")
        try:
            ip_address(host)
            valid = port.isascii() and port.isdecimal() and 1 <= int(port) <= 65_535
        except ValueError:
            valid = False
        if not valid:
            raise ValueError("comma-separated DNS servers: an address, address:port or [address]:port each")
    return value


def _domain(value: str) -> str:
    if not DOMAIN.fullmatch(value):
        raise ValueError("a lower-case domain such as share.example.com, with :port where it is not the usual one")
    return value


def _host_name(value: str) -> str:
    try:
        ip_address(value)
    except ValueError:
        if ":" in value or not DOMAIN.fullmatch(value):
            raise ValueError("a lower-case host name such as vms.example.com, or an address, without a port") from None
    return value


def _registry(value: str) -> str:
    # As in references: a word alone would be a path in a registry.
    said = "." in value or ":" in value or value == "localhost"
    if value and not (said and DOMAIN.fullmatch(value)):
        raise ValueError("a lower-case host such as registry.example.com, with :port where it is not the usual one")
    return value


def _images(value: str) -> str:
    if not all(IMAGE_NAME.fullmatch(name) for name in comma_separated(value)):
        raise ValueError("comma-separated names of recipes: a-z, 0-9, dot and dash")
    return value


def _variants(value: str) -> str:
    for text in comma_separated(value):
        variant, equals, image = text.partition("=")
        if not (equals and IMAGE_NAME.fullmatch(variant.strip()) and image.strip()):
            raise ValueError("comma-separated pairs variant=image")
    return value


def _key(value: SecretStr) -> SecretStr:
    try:
        size = len(base64.b64decode(value.get_secret_value().strip(), validate=True))
    except (binascii.Error, ValueError):
        size = 0
    if size != KEY_BYTES:
        raise ValueError(f"the base64 of a {KEY_BYTES}-byte key")
    return value


def comma_separated(text: str) -> list[str]:
    """The parts of a comma-separated setting, without blanks and empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


CommaSeparated = Annotated[str, BeforeValidator(_joined)]
Address = Annotated[str, AfterValidator(_address)]
Networks = Annotated[CommaSeparated, AfterValidator(_networks)]
Servers = Annotated[CommaSeparated, AfterValidator(_servers)]
Domain = Annotated[str, AfterValidator(_domain)]
HostName = Annotated[str, AfterValidator(_host_name)]
Registry = Annotated[str, AfterValidator(_registry)]
ImageNames = Annotated[CommaSeparated, AfterValidator(_images)]
ImageVariants = Annotated[CommaSeparated, AfterValidator(_variants)]
MasterKey = Annotated[SecretStr, AfterValidator(_key)]
