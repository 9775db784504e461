"""Locks of npm and pip packages: those of the agents are good, and nothing passes that has no hash or names an address."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from innkeeper.host.disks.image_recipe import RecipeInvalid, load_recipe, recipe_folder
from innkeeper.host.disks.language_lock import LanguageLockInvalid, check_language_locks

SHIPPED = Path(__file__).parents[4] / "images"
PLACE = "node_modules/@anthropic-ai/claude-code"


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED, tmp_path / "images")
    return tmp_path / "images" / "agents" / "claude-code"


@pytest.mark.parametrize("name", sorted(path.name for path in (SHIPPED / "agents").iterdir()))
def test_every_agent_has_a_recipe_with_good_locks(name: str) -> None:
    recipe = load_recipe(recipe_folder(SHIPPED, name))
    assert (recipe.name, recipe.user) == (name, "user")
    assert any((recipe.directory / kind).is_dir() for kind in ("npm", "pip"))


def _without_hash(packages: dict[str, Any]) -> None:
    del packages[PLACE]["integrity"]


def _with_weak_hash(packages: dict[str, Any]) -> None:
    packages[PLACE]["integrity"] = "sha1-AAAAAAAAAAAAAAAAAAAAAAAAAAA="


def _with_address(packages: dict[str, Any]) -> None:
    packages[PLACE]["resolved"] = "https://r.example/x.tgz"


def _linked(packages: dict[str, Any]) -> None:
    packages[PLACE]["link"] = True


def _outside(packages: dict[str, Any]) -> None:
    packages["node_modules/../../etc"] = packages[PLACE]


def _said_to_be_bundled(packages: dict[str, Any]) -> None:
    packages[PLACE].update(inBundle=True)
    del packages[PLACE]["integrity"]


def _of_something_else(packages: dict[str, Any]) -> None:
    packages[""]["dependencies"]["another"] = "1.0.0"


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (_without_hash, "has no SHA-512"),
        (_with_weak_hash, "has no SHA-512"),
        (_said_to_be_bundled, "has no SHA-512"),
        (_with_address, "names an address"),
        (_linked, "names an address"),
        (_outside, "not a package"),
        (_of_something_else, "the lock of something else"),
    ],
)
def test_an_npm_lock_is_refused(agent: Path, break_it: Callable[[dict[str, Any]], None], reason: str) -> None:
    path = agent / "npm" / "package-lock.json"
    lock = json.loads(path.read_text())
    break_it(lock["packages"])
    path.write_text(json.dumps(lock))
    with pytest.raises(RecipeInvalid, match=reason):
        load_recipe(agent)


@pytest.mark.parametrize("name", ["package.json", "package-lock.json"])
def test_one_of_npms_files_alone_is_refused(agent: Path, name: str) -> None:
    (agent / "npm" / name).unlink()
    with pytest.raises(RecipeInvalid, match=name):
        load_recipe(agent)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "requests==2.32.5",
        "requests --hash=sha256:" + "0" * 64,
        "requests==2.32.5 --hash=md5:" + "0" * 32,
        "--index-url https://r.example/simple",
        "requests @ https://r.example/x.whl --hash=sha256:" + "0" * 64,
    ],
)
def test_a_pip_lock_is_refused(tmp_path: Path, line: str) -> None:
    good = "anyio==4.12.1 --hash=sha256:" + "0" * 64 + "\n"
    (tmp_path / "pip").mkdir()
    lock = tmp_path / "pip" / "requirements.txt"
    lock.write_text("# a remark\n" + good)
    check_language_locks(tmp_path)
    lock.write_text(good + line + "\n")
    with pytest.raises(LanguageLockInvalid, match=r"requirements\.txt:2"):
        check_language_locks(tmp_path)


def test_the_description_of_an_agent_makes_no_other_image_and_a_lock_does(agent: Path) -> None:
    before = load_recipe(agent).digest
    with (agent / "agent.toml").open("a") as description:
        description.write("\n# a remark\n")
    assert load_recipe(agent).digest == before
    lock = agent / "npm" / "package-lock.json"
    lock.write_text(lock.read_text() + "\n")
    assert load_recipe(agent).digest != before
