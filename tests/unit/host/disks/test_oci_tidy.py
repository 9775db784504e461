"""Whose a file of an unpacked image is, as rootless tools write it down; whatever a stranger put there is read safely."""

import pytest

from innkeeper.host.disks.oci_tidy import owner_of


def test_owners() -> None:
    assert owner_of(b"\x08\xe8\x07\x10\xe9\x07") == (1000, 1001)
    assert owner_of(b"") == (0, 0)
    assert owner_of(b"\x08\xff\xff\xff\xff\x0f") == (65_534, 0)


@pytest.mark.parametrize("wrong", [b"\x08", b"\x08\x80", b"\x0a\x01a", b"\x18\x01", b"\x08" + b"\x80" * 20 + b"\x01"])
def test_owners_that_are_none(wrong: bytes) -> None:
    assert owner_of(wrong) == (65_534, 65_534)
