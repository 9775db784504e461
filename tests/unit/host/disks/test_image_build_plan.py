"""What a build is told: its plan as shell text, its command line, its environment."""

import shutil
import subprocess
from pathlib import Path

from innkeeper.host.disks.image_build import build_argv, build_environment, plan_text
from innkeeper.host.disks.image_recipe import TREE_SCRIPT, load_recipe
from innkeeper.host.disks.package_lock import LOCK, Mirrors, PackageLock

SHIPPED = Path(__file__).parents[4] / "images"


def _shell(text: str, expression: str) -> str:
    return subprocess.run(["bash", "-c", f"{text}\n{expression}"], capture_output=True, text=True, check=True).stdout


def test_the_plan_survives_the_shell(tmp_path: Path) -> None:
    odd = tmp_path / "a $(touch hit) 'b"
    (odd / "img").mkdir(parents=True)
    (odd / "img" / "recipe.toml").write_text("suite = 'trixie'\npackages = ['git', 'curl']")
    text = plan_text(load_recipe(odd / "img"), Path("/p q.erofs"))
    assert _shell(text, 'printf %s "$recipe"') == str(odd / "img")
    assert _shell(text, 'printf %s "$parent"') == "/p q.erofs"
    assert _shell(text, 'printf "%s," "${packages[@]}"') == "git,curl,"


def test_a_plan_is_the_same_for_the_same_recipe_and_has_only_public_sources() -> None:
    recipe = load_recipe(SHIPPED / "base")
    text = plan_text(recipe, None)
    assert text == plan_text(load_recipe(SHIPPED / "base"), None)
    assert "mirror=http://deb.debian.org/debian\n" in text
    assert _shell(text, 'printf %s "$parent"') == ""


def test_a_lock_says_which_mirrors_and_whose_time(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "base", tmp_path / "base")
    free = plan_text(load_recipe(tmp_path / "base"), None)
    there = Mirrors("http://snapshot.debian.org/archive/debian/1", "file:///srv/security")
    lock = PackageLock("amd64", "20260101T000000Z", 1234567890, there, {"bash": "5.2.37-2+b10"})
    (tmp_path / "base" / LOCK).write_text(lock.text())
    text = plan_text(load_recipe(tmp_path / "base"), None)
    assert _shell(text, 'printf %s "$mirror $security_mirror $epoch"') == f"{there.main} {there.security} 1234567890"
    # Lists of that day are past their date.
    assert _shell(text, 'printf %s "$source_options"') == "[check-valid-until=no] "
    # What is not a matter of packages stays the same, or a lock would not make the bytes that it was written for.
    assert _shell(text, 'printf %s "$uuid"') == _shell(free, 'printf %s "$uuid"')


def test_a_build_dies_with_its_daemon_and_takes_its_mounts_along() -> None:
    argv = build_argv(Path("/w"))
    assert argv[:3] == ["setpriv", "--pdeathsig", "KILL"]
    assert {"--mount", "--pid", "--fork", "--kill-child=KILL"} <= set(argv)
    assert argv[-3:] == ["bash", str(TREE_SCRIPT), "/w"]


def test_a_build_inherits_proxies_and_nothing_else() -> None:
    environment = build_environment(
        {"http_proxy": "http://p:1", "SECRET": "x", "PATH": "/evil", "DEBIAN_FRONTEND": "gtk"}
    )
    assert environment["http_proxy"] == "http://p:1"
    assert set(environment) == {"PATH", "LANG", "http_proxy"}
    assert "/evil" not in environment["PATH"]
