"""Recipes of the shipped images: a folder with recipe.toml, an optional customize.sh, optional files to copy in, and optional locks.

Those of agents lie one folder deeper, in `agents/`, each beside the agent's description.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innkeeper.host.disks.language_lock import LanguageLockInvalid, check_language_locks
from innkeeper.host.disks.package_lock import LOCK, PACKAGE, LockInvalid, PackageLock, installed_packages, load_lock

TREE_SCRIPT = Path(__file__).with_name("image_tree.sh")
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
KNOWN_KEYS = frozenset({"from", "suite", "packages", "user", "workdir", "env", "tools"})
MAX_DEPTH = 8
AGENTS = "agents"
# What an instance is made with, and no part of the image.
AGENT_DESCRIPTION = "agent.toml"


class RecipeInvalid(ValueError):  # noqa: N818  # reads as a sentence where it is raised
    """A recipe that cannot be built, naming the file and the reason."""

    code = "recipe_invalid"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One image's recipe with everything it takes over from the image below it.

    `packages` are its own; `env` and `tools` (name -> Debian package that carries the version) include the parent's.
    `digest` changes with any file of the folder, of the parents' folders, and of the code that builds them. `identity` is the
    same without the locks: it goes into the image, and an image that was built to be locked has to come out again of its lock.
    """

    name: str
    directory: Path
    parent: Recipe | None
    suite: str
    packages: tuple[str, ...]
    user: str
    workdir: str
    env: dict[str, str]
    tools: dict[str, str]
    digest: str
    identity: str
    lock: PackageLock | None


def recipe_folder(recipes: Path, name: str) -> Path:
    """The folder of a shipped image's recipe, an agent's included; there may be none."""
    agent = recipes / AGENTS / name
    return agent if agent.is_dir() else recipes / name


def load_recipe(directory: Path) -> Recipe:
    """The recipe in `directory`; its parent is the folder named by `from` beside it, or beside `agents`. Costs a few milliseconds.

    Raises RecipeInvalid.
    """
    return _load(directory, depth=0)


def _load(directory: Path, depth: int) -> Recipe:
    path = directory / "recipe.toml"
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise RecipeInvalid(f"{path}: no such recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeInvalid(f"{path}: {error}") from error
    if unknown := sorted(table.keys() - KNOWN_KEYS):
        raise RecipeInvalid(f"{path}: unknown: {', '.join(unknown)}")
    if not NAME.fullmatch(directory.name):
        raise RecipeInvalid(f"{directory}: not a name for an image")
    if depth == MAX_DEPTH:
        raise RecipeInvalid(f"{path}: more than {MAX_DEPTH} images on top of each other")
    parent = None
    if "from" in table:
        if "suite" in table or not NAME.fullmatch(str(table["from"])):
            raise RecipeInvalid(f"{path}: 'from' names another image, and the suite is that image's")
        beside = directory.parent.parent if directory.parent.name == AGENTS else directory.parent
        parent = _load(beside / table["from"], depth + 1)
    elif not isinstance(table.get("suite"), str):
        raise RecipeInvalid(f"{path}: needs a 'suite' or a 'from'")
    packages = tuple(table.get("packages", ()))
    if bad := [name for name in packages if not isinstance(name, str) or not PACKAGE.fullmatch(name)]:
        raise RecipeInvalid(f"{path}: not a package: {bad[0]!r}")
    try:
        lock = load_lock(directory / LOCK)
        check_language_locks(directory)
    except (LockInvalid, LanguageLockInvalid) as error:
        raise RecipeInvalid(str(error)) from error
    identity = _identity(directory, parent)
    return Recipe(
        name=directory.name,
        directory=directory,
        parent=parent,
        suite=parent.suite if parent else table["suite"],
        packages=packages,
        user=table.get("user", parent.user if parent else "root"),
        workdir=table.get("workdir", parent.workdir if parent else "/"),
        env=(parent.env if parent else {}) | _strings(path, table, "env"),
        tools=(parent.tools if parent else {}) | _strings(path, table, "tools"),
        digest=_digest(identity, parent, lock),
        identity=identity,
        lock=lock,
    )


def _strings(path: Path, table: dict[str, Any], key: str) -> dict[str, str]:
    value = table.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise RecipeInvalid(f"{path}: '{key}' is a table of strings")
    return value


def _digest(identity: str, parent: Recipe | None, lock: PackageLock | None) -> str:
    parts = (identity, parent.digest if parent else "", lock.text() if lock else "")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _identity(directory: Path, parent: Recipe | None) -> str:
    digest = hashlib.sha256(TREE_SCRIPT.read_bytes())
    if parent:
        digest.update(parent.identity.encode())
    for path in sorted(directory.rglob("*")):
        if path in (directory / LOCK, directory / AGENT_DESCRIPTION):
            continue
        if path.is_symlink() or path.is_file():
            content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
            executable = path.lstat().st_mode & 0o111 != 0
            head = f"{path.relative_to(directory)}\0{executable}\0{len(content)}\0"
            digest.update(head.encode() + content)
    return digest.hexdigest()


def tool_versions(tools: dict[str, str], dpkg_status: str) -> tuple[str, ...]:
    """`Python 3.13.5` for every tool whose package a dpkg status file lists as installed, in the recipe's order."""
    installed = installed_packages(dpkg_status)
    return tuple(
        f"{name} {upstream_version(installed[package])}" for name, package in tools.items() if package in installed
    )


def upstream_version(version: str) -> str:
    """The upstream part of a Debian version: `1:2.47.3+dfsg-1` -> `2.47.3`."""
    without_epoch = version.partition(":")[2] if ":" in version else version
    upstream = without_epoch.rpartition("-")[0] if "-" in without_epoch else without_epoch
    return re.split(r"[+~]", upstream, maxsplit=1)[0]
