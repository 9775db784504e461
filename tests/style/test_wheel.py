"""The wheel holds what a server needs beside Python: built, installed in an environment of its own, asked."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASK = """
from innkeeper import shipped
from innkeeper.settings import Settings
print(shipped.PACKAGE, shipped.agent_binary(Settings()), shipped.recipes(Settings()), sep="\\n")
"""


def run(*argv, cwd):
    done = subprocess.run(
        argv, cwd=cwd, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory, ROOT, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An interpreter with the wheel installed. Its dependencies are the ones of this environment."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, symlinks=True, with_pip=False)
    interpreter = home / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    # A line in a .pth file adds a folder without reading that folder's own .pth files: the checkout stays out.
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", wheel, cwd=home)
    return interpreter


def test_the_wheel_says_what_it_runs_on(wheel):
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")


def test_every_recipe_is_in_it_as_it_is_here(wheel):
    with zipfile.ZipFile(wheel) as file:
        packed = {
            info.filename.removeprefix("innkeeper/shipped/images/"): (
                file.read(info),
                (info.external_attr >> 16) & 0o111,
            )
            for info in file.infolist()
            if info.filename.startswith("innkeeper/shipped/images/")
        }
    here = {
        str(path.relative_to(ROOT / "images")): (path.read_bytes(), path.stat().st_mode & 0o111)
        for path in (ROOT / "images").rglob("*")
        if path.is_file()
    }
    assert packed == here


def test_an_installed_server_finds_its_parts(python, tmp_path):
    package, agent, recipes = (Path(line) for line in run(python, "-c", ASK, cwd=tmp_path).split())
    assert package.is_relative_to(python.parents[1])
    assert agent == package / "shipped" / "inn-agent"
    assert os.access(agent, os.X_OK)
    assert agent.read_bytes()[:4] == b"\x7fELF"
    assert (recipes / "base" / "recipe.toml").is_file()


def test_the_command_works(python, tmp_path):
    here = run(Path(sys.executable).parent / "inn", "version", cwd=tmp_path)
    assert run(python.parent / "inn", "version", cwd=tmp_path) == here
