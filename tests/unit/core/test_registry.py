"""References to images in registries, as strictly as they are read."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from innkeeper.core.registry import RegistryPolicy, is_public, parse_policy, parse_reference
from innkeeper.errors import InvalidRequestError

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("r.example/a/b/c:v1_2.3-x", "r.example/a/b/c:v1_2.3-x"),
        ("localhost/x", "localhost/x:latest"),
        ("r.example:5000/a", "r.example:5000/a:latest"),
        ("10.0.0.1:5000/a", "10.0.0.1:5000/a:latest"),
        (f"r.example/a@{DIGEST}", f"r.example/a@{DIGEST}"),
        (f"r.example/a:1@{DIGEST}", f"r.example/a@{DIGEST}"),
    ],
)
def test_references(text: str, means: str) -> None:
    assert str(parse_reference(text)) == means


@pytest.mark.parametrize(
    "text",
    ["", " ", "alpine", "alpine:3", "team/app", "team/app:1",
      "docker://alpine", "dir:/etc", "oci-archive:/x.tar", "docker-archive:x", "/etc/passwd", "./x", "../x", "a/../b",
     "http://r/x", "a b", "a\n",
     "Alpine", "x:", "x@", "x@sha256:1",
     f"x@md5:{'0' * 32}", "r.example:99999/x", "r.example:0/x", "-r.example/x", "r.example//x", "r.example/x/", "r.example/", "oci:a",
     "r.example/x:a/b", "user@r.example/x", "user:pass@r.example/x", "r.example/x?y", "r.example/x#y", "é/x",
     "x" * 513, "a/" * 300, "r.example/-x", "--x", "[::1/x"],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="reference: not an image in a registry"):
        parse_reference(text)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("python:3.12-slim", "r.example:5000/library/python:3.12-slim"),
        ("alpine", "r.example:5000/library/alpine:latest"),
        ("team/app:1", "r.example:5000/team/app:1"),
        (f"team/app@{DIGEST}", f"r.example:5000/team/app@{DIGEST}"),
        # Those that say theirs keep it.
        ("other.example/app", "other.example/app:latest"),
        ("localhost/app", "localhost/app:latest"),
    ],
)
def test_names_without_a_registry(text: str, means: str) -> None:
    made = parse_reference(text, default_registry="r.example:5000")
    # The host, which reads it again, has no default.
    assert str(made) == means and parse_reference(str(made)) == made


@pytest.mark.parametrize("text", ["python:3", "team/app", f"alpine@{DIGEST}"])
def test_without_a_default_registry_the_reason_says_so(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="no registry for names without one"):
        parse_reference(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "docker://alpine",
        "dir:/etc",
        "oci-archive:/x.tar",
        "/etc/passwd",
        "./x",
        "../x",
        "a/../b",
        "http://r/x",
        "Alpine",
        "x:",
        "x@",
        "-x",
        "x y",
    ],
)
def test_a_default_registry_makes_no_reference_of_anything_else(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="not an image in a registry") as refused:
        parse_reference(text, default_registry="r.example")
    assert "names without one" not in str(refused.value)


@pytest.mark.parametrize("text", ["8.8.8.8", "2606:4700::1111"])
def test_public_addresses(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    ["10.0.0.1", "127.0.0.1", "169.254.169.254", "192.168.0.1", "172.31.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255",
     "198.18.0.1", "192.0.2.1", "168.63.129.16", "192.88.99.1", "::", "::1", "fe80::1", "fc00::1", "fec0::1",
     "ff02::1", "2001:db8::1", "64:ff9b::7f00:1", "2002:7f00:1::"],
)  # fmt: skip
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


def test_a_policy() -> None:
    policy = parse_policy("registry.lan, other.lan:5000, 10.1.0.0/16, fd00::/8")
    assert policy.may_be_insecure("registry.lan:5000") and policy.may_be_insecure("registry.lan")
    assert policy.may_be_insecure("other.lan:5000") and not policy.may_be_insecure("other.lan:5001")
    assert policy.may_be_insecure("10.1.2.3:5000") and not policy.may_be_insecure("10.2.0.1:5000")
    assert policy.allows("x", 1, ip_address("fd00::1")) and not policy.allows("x", 1, ip_address("fe80::1"))
    # A name that leads into a named network may be reached, and has to prove itself.
    assert policy.allows("db.lan", 443, ip_address("10.1.2.3")) and not policy.may_be_insecure("db.lan")
    assert not RegistryPolicy().may_be_insecure("8.8.8.8")
    for bad in ("a b", "http://x", "10.0.0.0/33", "x:99999"):
        with pytest.raises(ValueError, match="neither a host nor a network"):
            parse_policy(bad)
