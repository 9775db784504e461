"""The lock of a recipe: which version of every package its image holds, and from which moment's mirrors."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LOCK = "packages.lock"
MIRROR = re.compile(r"(https?|file)://?[!-~]+")
# What may stand in apt's preferences, as Debian's policy has it.
VERSION = re.compile(r"[0-9][A-Za-z0-9.+~:-]*")
PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
# Above everything, downgrades of what a mirror has meanwhile included.
PIN_PRIORITY = 1001
SHOWN_DIFFERENCES = 10


class LockInvalid(ValueError):  # noqa: N818  # reads as a sentence where it is raised
    """A lock that cannot be used, naming the file and the reason."""

    code = "lock_invalid"


@dataclass(frozen=True, slots=True)
class Mirrors:
    """Where packages come from: base addresses of the archive and of its security updates."""

    main: str
    security: str


DEBIAN = Mirrors("http://deb.debian.org/debian", "http://deb.debian.org/debian-security")


@dataclass(frozen=True, slots=True)
class PackageLock:
    """`packages` maps every package of the image, those of the images below included, to its version.

    `source_date_epoch` is the second that no file of the image is newer than; `taken` the moment of the package lists, as the
    snapshot archive writes it.
    """

    architecture: str
    taken: str
    source_date_epoch: int
    mirrors: Mirrors
    packages: Mapping[str, str]

    def text(self) -> str:
        """The file."""
        fields = {
            "architecture": self.architecture,
            "taken": self.taken,
            "source_date_epoch": self.source_date_epoch,
            "mirror": self.mirrors.main,
            "security_mirror": self.mirrors.security,
        }
        lines = [
            "# Written by `inn image build-shipped --lock`. While this file is here, the image is built of exactly these packages.",
            "# When the mirrors no longer have them, name the archive of snapshots here, which does:",
            f"# http://snapshot.debian.org/archive/debian/{self.taken}/ and http://snapshot.debian.org/archive/debian-security/{self.taken}/",
            *(f"{name} = {json.dumps(value)}" for name, value in fields.items()),
            "",
            "[packages]",
            *(f"{json.dumps(name)} = {json.dumps(version)}" for name, version in sorted(self.packages.items())),
        ]
        return "\n".join(lines) + "\n"

    def preferences(self) -> str:
        """What apt is told, so that it takes the locked versions where a mirror has them."""
        pins = (
            f"Package: {name}\nPin: version {version}\nPin-Priority: {PIN_PRIORITY}\n"
            for name, version in sorted(self.packages.items())
        )
        return "\n".join(pins)

    def differences(self, installed: Mapping[str, str]) -> list[str]:
        """A sentence for each package that is not as locked; empty when all are."""
        found = []
        for name in sorted(self.packages.keys() | installed.keys()):
            locked, got = self.packages.get(name), installed.get(name)
            if locked is None:
                found.append(f"{name}: {got} came in, and is not in the lock")
            elif got is None:
                found.append(f"{name}: locked at {locked}, and not installed")
            elif locked != got:
                found.append(f"{name}: locked at {locked}, the mirror has {got}")
        return found


def load_lock(path: Path) -> PackageLock | None:
    """The lock at `path`, or None where there is none. Raises LockInvalid."""
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LockInvalid(f"{path}: {error}") from error
    wanted = {
        "architecture": str,
        "taken": str,
        "source_date_epoch": int,
        "mirror": str,
        "security_mirror": str,
        "packages": dict,
    }
    for name, kind in wanted.items():
        if not isinstance(table.get(name), kind):
            raise LockInvalid(f"{path}: {name!r} is missing, or of another kind than {kind.__name__}")
    if unknown := sorted(table.keys() - wanted.keys()):
        raise LockInvalid(f"{path}: unknown: {', '.join(unknown)}")
    for name, version in table["packages"].items():
        if not PACKAGE.fullmatch(name) or not isinstance(version, str) or not VERSION.fullmatch(version):
            raise LockInvalid(f"{path}: not a package and its version: {name!r} = {version!r}")
    mirrors = Mirrors(checked_mirror(table["mirror"]), checked_mirror(table["security_mirror"]))
    return PackageLock(table["architecture"], table["taken"], table["source_date_epoch"], mirrors, table["packages"])


def checked_mirror(text: str) -> str:
    """The address without a slash at its end. Raises LockInvalid: it becomes a word of apt's list of sources."""
    if not MIRROR.fullmatch(text):
        raise LockInvalid(f"not the address of a mirror: {text!r}")
    return text.rstrip("/")


def installed_packages(dpkg_status: str) -> dict[str, str]:
    """{package: version} of what a dpkg status file lists as installed."""
    installed = {}
    for stanza in dpkg_status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Status): (.*)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            installed[fields["Package"]] = fields["Version"]
    return installed


def listed(differences: list[str]) -> str:
    """The first of them, one a line, and how many more there are."""
    more = len(differences) - SHOWN_DIFFERENCES
    return "\n".join([*differences[:SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])])
