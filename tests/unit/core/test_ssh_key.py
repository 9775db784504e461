from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from innkeeper.core.ssh_key import parse_ssh_key
from innkeeper.errors import InvalidRequestError

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def generated(folder: Path, *options: str) -> tuple[str, str]:
    """A new public key, and its fingerprint as ssh-keygen tells it."""
    path = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-C", "me@here", "-f", path, *options], check=True)
    told = subprocess.run(["ssh-keygen", "-l", "-f", f"{path}.pub"], check=True, capture_output=True, text=True).stdout
    return path.with_suffix(".pub").read_text(), told.split()[1]


@pytest.mark.parametrize("options", [("-t", "ed25519"), ("-t", "ecdsa"), ("-t", "rsa", "-b", "2048")], ids=str)
def test_the_fingerprint_is_ssh_keygens(tmp_path: Path, options: tuple[str, ...]) -> None:
    line, fingerprint = generated(tmp_path, *options)
    key = parse_ssh_key(line, number=3, created_at=NOW)
    assert (key.number, key.fingerprint, key.comment) == (3, fingerprint, "me@here")
    assert line.startswith(key.public_key) and "me@here" not in key.public_key
    assert parse_ssh_key(key.public_key, number=3, created_at=NOW).fingerprint == fingerprint


def test_weak_keys_are_refused(tmp_path: Path) -> None:
    line, _ = generated(tmp_path, "-t", "rsa", "-b", "1024")
    with pytest.raises(InvalidRequestError, match="2048"):
        parse_ssh_key(line, number=1, created_at=NOW)


@pytest.mark.parametrize(
    "line",
    [
        "", "x", "ssh-ed25519", "ssh-ed25519 !!!", "ssh-ed25519 AAAA", "ssh-dss AAAAB3NzaC1kc3MAAACBAA==",
        'command="rm -rf /" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA',
        "ssh-ed25519 AAAAB3NzaC1yc2EAAAADAQABAAAAgQ== an RSA key that says otherwise",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAA\nssh-ed25519 AAAA", "ssh-ed25519 " + "A" * 20_000,
        "-----BEGIN OPENSSH PRIVATE KEY----- abc",
    ],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_key_is_refused_and_not_repeated(line: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_ssh_key(line, number=1, created_at=NOW)
    assert "public_key: " in refused.value.message and "rm -rf" not in refused.value.message


def test_a_comment_is_printable_and_bounded() -> None:
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA" + "A" * 42
    assert parse_ssh_key(f"{key} a\x1b[31mb\x07 c", number=1, created_at=NOW).comment == "a[31mb c"
    assert len(parse_ssh_key(f"{key} {'x' * 5000}", number=1, created_at=NOW).comment) == 256
