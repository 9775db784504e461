"""The linters are tests: one rule book for everybody, and no job elsewhere that nobody looks at."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.prefix) / "bin"
SHELL_SCRIPTS = [
    ".ci/run",
    *sorted(
        str(path.relative_to(ROOT)) for folder in ("setup", "images", "src") for path in (ROOT / folder).rglob("*.sh")
    ),
    *(f"setup/debian/{name}" for name in ("postinst", "prerm", "postrm")),
]


def check(*argv, cwd=ROOT, **env):
    """Run a linter; what it says is the failure."""
    done = subprocess.run(
        argv, cwd=cwd, env={**os.environ, "NO_COLOR": "1", **env}, capture_output=True, text=True, timeout=250
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, argv))}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def test_ruff_finds_nothing():
    check(BIN / "ruff", "check", "--no-cache", "--output-format", "concise", ".")


def test_ruff_would_format_nothing():
    check(BIN / "ruff", "format", "--no-cache", "--check", ".")


def test_mypy_is_strictly_content():
    check(BIN / "mypy")


def test_imports_point_one_way():
    check(BIN / "lint-imports", "--no-cache", PYTHONPATH=str(ROOT / "src"))


@pytest.fixture(scope="session")
def go(tmp_path_factory):
    binary = shutil.which("go")
    if binary is None:
        pytest.skip("there is no go here: make test installs it")
    return binary


def check_go(go, *arguments):
    # As the agent is built: a C compiler is not among what is installed. Go needs a home for its caches.
    home = os.environ.get("HOME", "/root")
    return check(go, *arguments, cwd=ROOT / "guest", CGO_ENABLED="0", GOFLAGS="-buildvcs=false", HOME=home)


def test_gofmt_would_change_nothing(go):
    assert check("gofmt", "-l", "guest") == ""


def test_go_vet_finds_nothing(go):
    check_go(go, "vet", "./...")


# They start programs and wait for them: the same second try as for tests that do so from here. Go remembers what has passed.
@pytest.mark.flaky(reruns=1)
def test_go_tests_pass(go):
    check_go(go, "test", "./...")


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("there is no shellcheck here: make test installs it")
    check("shellcheck", script)
