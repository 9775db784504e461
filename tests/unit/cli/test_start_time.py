"""What `inn` imports before it knows what is asked: only that keeps it quick, whatever the machine does beside."""

import subprocess
import sys

import pytest

SLOW = ("pydantic", "rich", "httpx2", "sqlalchemy", "fastapi", "structlog", "asyncio")


def _imported(*argv: str) -> set[str]:
    code = (
        "import sys\nfrom innkeeper.cli.main import main\n"
        "try:\n main()\nexcept SystemExit:\n pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=20, check=True)
    return set(ended.stderr.split())


@pytest.mark.parametrize("argv", [("version",), ("--help",)])
def test_nothing_slow_is_imported(argv):
    assert _imported(*argv).isdisjoint(SLOW)


def test_the_server_is_never_imported_by_a_command_that_only_asks_it():
    assert _imported("room", "--help").isdisjoint({"sqlalchemy", "fastapi", "structlog", "uvicorn"})
