"""What a build is told: its plan as shell text, its command line, its environment."""

import subprocess
from pathlib import Path

from innkeeper.host.disks.image_build import build_argv, build_environment, plan_text
from innkeeper.host.disks.image_recipe import TREE_SCRIPT, load_recipe

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
