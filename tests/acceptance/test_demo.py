"""`make demo`, as it stands in the project, against the real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from server_fixture import Server, plain_environment

DEMO = Path(__file__).parents[2] / "deploy" / "demo.py"


def test_the_demo_draws_and_fetches_its_chart(innkeeper: Server) -> None:
    done = subprocess.run(
        [sys.executable, DEMO],
        env={**plain_environment(), "INNKEEPER_URL": innkeeper.url, "INNKEEPER_HOME": str(innkeeper.home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])
    assert answer["result"]["output"] == "" and len(answer["result"]["files_changed"]) == 1
    assert "Fetched without a token" in done.stdout


def test_a_demo_that_cannot_be_says_why(innkeeper: Server) -> None:
    done = subprocess.run(
        [sys.executable, DEMO],
        env={**plain_environment(), "INNKEEPER_URL": "http://127.0.0.1:1", "INNKEEPER_HOME": str(innkeeper.home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "make run" in done.stderr
