"""Recipes: what is read, what is inherited, what is refused, and what makes an image stale."""

import shutil
import time
from pathlib import Path

import pytest

from innkeeper.host.disks.image_recipe import RecipeInvalid, load_recipe, tool_versions, upstream_version
from innkeeper.host.disks.package_lock import DEBIAN, LOCK, PackageLock

SHIPPED = Path(__file__).parents[4] / "images"


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED, tmp_path / "images")
    return tmp_path / "images"


def test_a_derived_image_takes_over_what_it_does_not_say_itself() -> None:
    data_science = load_recipe(SHIPPED / "python-data-science")
    base = load_recipe(SHIPPED / "base")
    assert data_science.parent == base
    assert (data_science.user, data_science.workdir, data_science.suite) == ("user", "/home/user", base.suite)
    assert data_science.env == {**base.env, "MPLBACKEND": "Agg"}
    assert list(data_science.tools)[: len(base.tools)] == list(base.tools)
    assert "python3-numpy" in data_science.packages
    assert "git" not in data_science.packages


@pytest.mark.parametrize("name", ["base", "python-data-science", "node"])
def test_shipped_recipes_load_fast_enough_to_check_at_every_start(name: str) -> None:
    best = min(_milliseconds(SHIPPED / name) for _ in range(5))
    assert best < 50


def _milliseconds(directory: Path) -> float:
    began = time.perf_counter()
    load_recipe(directory)
    return (time.perf_counter() - began) * 1000


def test_the_digest_follows_every_file_and_every_parent(recipes: Path) -> None:
    before = load_recipe(recipes / "node").digest
    assert load_recipe(recipes / "node").digest == before
    policy = recipes / "base" / "files" / "usr" / "sbin" / "policy-rc.d"
    policy.chmod(0o644)
    without_mode = load_recipe(recipes / "node").digest
    policy.write_text("#!/bin/sh\n")
    without_text = load_recipe(recipes / "node").digest
    (recipes / "node" / "files").mkdir()
    (recipes / "node" / "files" / "new").write_text("")
    assert len({before, without_mode, without_text, load_recipe(recipes / "node").digest}) == 4


def test_a_lock_makes_another_image_of_the_recipe_and_of_those_above(recipes: Path) -> None:
    before = [load_recipe(recipes / name) for name in ("base", "node")]
    lock = PackageLock("amd64", "20260101T000000Z", 1, DEBIAN, {"bash": "5.2.37-2+b10"})
    (recipes / "base" / LOCK).write_text(lock.text())
    after = [load_recipe(recipes / name) for name in ("base", "node")]
    assert [one.lock for one in after] == [lock, None]
    assert all(old.digest != new.digest for old, new in zip(before, after, strict=True))
    assert [one.identity for one in after] == [one.identity for one in before]
    (recipes / "base" / LOCK).write_text("# a remark\n" + lock.text())
    assert load_recipe(recipes / "node").digest == after[1].digest
    (recipes / "base" / LOCK).write_text(lock.text().replace("5.2.37", "5.2.38"))
    assert load_recipe(recipes / "node").digest != after[1].digest
    (recipes / "base" / LOCK).write_text("bash 5.2.37")
    with pytest.raises(RecipeInvalid, match=LOCK):
        load_recipe(recipes / "node")


def test_the_digest_does_not_depend_on_where_the_recipe_lies(recipes: Path) -> None:
    assert load_recipe(recipes / "node").digest == load_recipe(SHIPPED / "node").digest


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("packages = []", "needs a 'suite' or a 'from'"),
        ("suite = 'trixie'\nfrom = 'base'", "the suite is that image's"),
        ("from = '../base'", "names another image"),
        ("from = 'nothing'", "no such recipe"),
        ("from = 'odd'", "on top of each other"),
        ("suite = 'trixie'\nsuits = 1", "unknown: suits"),
        ("suite = 'trixie'\npackages = ['--allow-unauthenticated']", "not a package"),
        ("suite = 'trixie'\npackages = ['git;id']", "not a package"),
        ("suite = 'trixie'\n[env]\nA = 1", "'env' is a table of strings"),
        ("suite =", "recipe.toml"),
    ],
)
def test_a_recipe_that_cannot_be_built_is_refused_with_the_reason(recipes: Path, text: str, reason: str) -> None:
    (recipes / "odd").mkdir()
    (recipes / "odd" / "recipe.toml").write_text(text)
    with pytest.raises(RecipeInvalid, match=reason):
        load_recipe(recipes / "odd")


def test_tool_versions_come_from_installed_packages_only() -> None:
    status = (
        "Package: python3\nStatus: install ok installed\nVersion: 3.13.5-1\nDescription: x\n more\n\n"
        "Package: git\nStatus: install ok installed\nVersion: 1:2.47.3-0+deb13u1\n\n"
        "Package: jq\nStatus: deinstall ok config-files\nVersion: 1.7.1-6\n"
    )
    tools = {"git": "git", "Python": "python3", "jq": "jq", "absent": "absent"}
    assert tool_versions(tools, status) == ("git 2.47.3", "Python 3.13.5")


@pytest.mark.parametrize(
    ("version", "upstream"),
    [
        ("3.13.5-1", "3.13.5"),
        ("1:2.2.4+ds-1", "2.2.4"),
        ("20.19.2+dfsg-1+deb13u2", "20.19.2"),
        ("9.2.0~ds1-3", "9.2.0"),
        ("7", "7"),
    ],
)
def test_upstream_version(version: str, upstream: str) -> None:
    assert upstream_version(version) == upstream
