"""Locks: read as written, refused with the reason, and what differs from them by name."""

from pathlib import Path

import pytest

from innkeeper.host.disks.package_lock import (
    DEBIAN,
    LOCK,
    LockInvalid,
    Mirrors,
    PackageLock,
    checked_mirror,
    installed_packages,
    listed,
    load_lock,
)

PACKAGES = {"bash": "5.2.37-2+b10", "libstdc++6": "14.2.0-19", "vim-tiny": "2:9.1.1230-2"}


def lock(**fields: object) -> PackageLock:
    known = {
        "architecture": "amd64",
        "taken": "20261101T060000Z",
        "source_date_epoch": 1789199741,
        "mirrors": DEBIAN,
        "packages": PACKAGES,
    }
    return PackageLock(**{**known, **fields})  # type: ignore[arg-type]


def test_a_lock_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    assert load_lock(path) is None
    written = lock(mirrors=Mirrors("http://snapshot.debian.org/archive/debian/20261101T060000Z", "file:/srv/security"))
    path.write_text(written.text())
    assert load_lock(path) == written
    # Whoever needs a later rebuild finds where the packages still are.
    assert "http://snapshot.debian.org/archive/debian-security/20261101T060000Z/" in written.text()


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("[packages]", "[pakete]", "'packages' is missing"),
        ("source_date_epoch = 1789199741", 'source_date_epoch = "now"', "'source_date_epoch'"),
        ('taken = "', 'until = "x"\ntaken = "', "unknown: until"),
        ('"bash" = "', '"bash\\nPin: *" = "', "not a package"),
        ("5.2.37-2+b10", "5.2.37\\nPackage: *", "not a package and its version: 'bash'"),
        ('http://deb.debian.org/debian"', 'ftp://x"', "not the address of a mirror: 'ftp://x'"),
        ('http://deb.debian.org/debian"', 'http://x y"', "not the address"),
        ("architecture", "=", LOCK),
    ],
)
def test_what_is_wrong_with_a_lock_is_said(tmp_path: Path, old: str, new: str, why: str) -> None:
    text = lock().text()
    assert old in text
    (tmp_path / LOCK).write_text(text.replace(old, new, 1))
    with pytest.raises(LockInvalid) as caught:
        load_lock(tmp_path / LOCK)
    assert why in str(caught.value)


def test_every_package_that_differs_is_named() -> None:
    found = lock().differences({"bash": "5.2.37-3", "libstdc++6": "14.2.0-19", "zip": "3.0-15"})
    assert found == [
        "bash: locked at 5.2.37-2+b10, the mirror has 5.2.37-3",
        "vim-tiny: locked at 2:9.1.1230-2, and not installed",
        "zip: 3.0-15 came in, and is not in the lock",
    ]
    assert lock().differences(PACKAGES) == []


def test_a_long_list_is_cut_and_counted() -> None:
    assert listed([str(number) for number in range(12)]).splitlines()[-2:] == ["9", "and 2 more"]
    assert listed(["one"]) == "one"


def test_apt_is_told_each_version() -> None:
    stanzas = lock().preferences().split("\n\n")
    assert stanzas[1] == "Package: libstdc++6\nPin: version 14.2.0-19\nPin-Priority: 1001"
    assert len(stanzas) == len(PACKAGES)


def test_what_was_removed_again_is_not_installed() -> None:
    status = """Package: bash
Status: install ok installed
Version: 5.2.37-2+b10

Package: nano
Status: deinstall ok config-files
Version: 8.4-1
"""
    assert installed_packages(status) == {"bash": "5.2.37-2+b10"}


def test_a_mirror_loses_its_last_slash() -> None:
    assert checked_mirror("https://deb.debian.org/debian/") == "https://deb.debian.org/debian"
