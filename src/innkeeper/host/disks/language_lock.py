"""The locks of a recipe's npm and pip packages: what is refused in them, so that nothing comes in that is not known by its hash.

`npm/package.json` and `npm/package-lock.json` become /opt/npm/node_modules, `pip/requirements.txt` the environment /opt/pip of the image. The host's npm
and pip fetch the packages, from wherever the host is set up to: a lock names no address, so that it is good on every host.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NPM_PACKAGE = Path("npm/package.json")
NPM_LOCK = Path("npm/package-lock.json")
PIP_LOCK = Path("pip/requirements.txt")
INTEGRITY = re.compile(r"sha512-[A-Za-z0-9+/]{86}==")
NPM_PLACE = re.compile(r"node_modules/[A-Za-z0-9@._-]+(/[A-Za-z0-9@._-]+)*")
NPM_LOCK_VERSION = 3
REQUIREMENT = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][A-Za-z0-9.+!]*( --hash=sha256:[0-9a-f]{64})+")


class LanguageLockInvalid(ValueError):  # noqa: N818  # reads as a sentence where it is raised
    """A lock that cannot be used, naming the file and the reason."""

    code = "language_lock_invalid"


def check_language_locks(directory: Path) -> None:
    """Check the locks of a recipe's folder; a recipe may have none. A few milliseconds. Raises LanguageLockInvalid."""
    if (directory / NPM_PACKAGE).exists() or (directory / NPM_LOCK).exists():
        _check_npm(directory / NPM_PACKAGE, directory / NPM_LOCK)
    if (directory / PIP_LOCK).exists():
        _check_pip(directory / PIP_LOCK)


def _check_npm(package_file: Path, lock_file: Path) -> None:
    wanted, lock = _object(package_file), _object(lock_file)
    if lock.get("lockfileVersion") != NPM_LOCK_VERSION:
        raise LanguageLockInvalid(f"{lock_file}: not of version {NPM_LOCK_VERSION}")
    packages = lock.get("packages")
    if not isinstance(packages, dict) or not isinstance(packages.get(""), dict):
        raise LanguageLockInvalid(f"{lock_file}: has no packages")
    if packages[""].get("dependencies") != wanted.get("dependencies"):
        raise LanguageLockInvalid(f"{lock_file}: is the lock of something else than {package_file.name}")
    for place, package in packages.items():
        if place == "":
            continue
        if not NPM_PLACE.fullmatch(place) or {".", ".."} & set(place.split("/")) or not isinstance(package, dict):
            raise LanguageLockInvalid(f"{lock_file}: not a package: {place!r}")
        if "resolved" in package or package.get("link"):
            raise LanguageLockInvalid(
                f"{lock_file}: {place} names an address; see npm's omit-lockfile-registry-resolved"
            )
        # One that another package brings inside of it is under that one's hash.
        bringer = place.rpartition("/node_modules/")[0]
        if package.get("inBundle") is True and bringer != "" and bringer in packages:
            continue
        # npm takes a package without a hash as it comes.
        if not INTEGRITY.fullmatch(str(package.get("integrity", ""))):
            raise LanguageLockInvalid(f"{lock_file}: {place} has no SHA-512")


def _check_pip(lock_file: Path) -> None:
    lines = _text(lock_file).splitlines()
    if not lines:
        raise LanguageLockInvalid(f"{lock_file}: is empty")
    for number, line in enumerate(lines, start=1):
        # An option in this file, such as another index, would be one of pip's.
        if not line.startswith("# ") and not REQUIREMENT.fullmatch(line):
            raise LanguageLockInvalid(f"{lock_file}:{number}: not `name==version --hash=sha256:…`")


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise LanguageLockInvalid(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise LanguageLockInvalid(f"{path}: is no object")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LanguageLockInvalid(f"{path}: {error}") from error
