"""What is taken of an operator's file of certificate authorities, and what doctor says of one that cannot be used."""

from pathlib import Path

import pytest
from tests.acceptance.internet_fixture import certificates

from innkeeper.host.disks.registry_authorities import FILE_BYTES_MAX, read_authorities
from innkeeper.host.probes.machine import check_authorities


def test_only_certificates_are_taken(tmp_path: Path) -> None:
    _, authority = certificates(tmp_path)
    path = tmp_path / "authorities.pem"
    path.write_bytes(b"# ours\n" + (tmp_path / "server.pem").read_bytes() + b"text\n" + authority)
    taken = read_authorities(path)
    assert taken.count(b"BEGIN CERTIFICATE") == 2 and b"KEY" not in taken and b"text" not in taken
    assert [check.ok for check in check_authorities(path)] == [True]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        (b"", "holds no certificate"),
        (b"-----BEGIN CERTIFICATE-----\nbm90IG9uZQ==\n-----END CERTIFICATE-----\n", "holds no certificate"),
        (b"x" * (FILE_BYTES_MAX + 1), "has more than"),
    ],
)
def test_what_is_no_file_of_authorities_keeps_a_server_from_starting(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "authorities.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_authorities(path)
    (check,) = check_authorities(path)
    assert (check.ok, check.required) == (False, True) and reason in check.detail and check.fix


def test_without_the_setting_there_is_nothing_to_say() -> None:
    assert check_authorities(None) == ()
