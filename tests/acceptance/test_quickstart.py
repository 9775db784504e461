"""The quickstart is what it says: its commands run as they stand, in order, and print what the page prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from server_fixture import INN, Server, plain_environment

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
STEP = re.compile(r"^```sh run\n(.*?)^```\n\n^```(?:json|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What differs from run to run.
UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
TIME = re.compile(r"\b20\d\d-\d\d-\d\dT[0-9:.]+Z")
HOST_NAME = re.compile(r'("host": \{\s*"id": "ID",\s*"name": )"[^"]*"')


def test_the_quickstart(innkeeper: Server, tmp_path: Path) -> None:
    text = PAGE.read_text()
    steps = STEP.findall(text)
    assert len(steps) == text.count("```sh run") >= 8
    commands = "\n".join(f"{command}\nprintf '\\n%s\\n' '-- end of step'" for command, _ in steps)
    commands = commands.replace("http://127.0.0.1:7070", innkeeper.url)
    commands = commands.replace("/var/lib/innkeeper", str(innkeeper.home))
    ran = subprocess.run(
        # As on a terminal: what goes to stderr is part of what is seen.
        ["bash", "-euo", "pipefail", "-c", f"exec 2>&1\n{commands}"],
        cwd=tmp_path,
        env={
            **plain_environment(),
            "PATH": f"{INN.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "INNKEEPER_HOME": str(innkeeper.home),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout
    printed = ran.stdout.split("\n-- end of step\n")
    assert [_without_ids(said) for said in printed[:-1]] == [_without_ids(expected) for _, expected in steps]


def _without_ids(text: str) -> str:
    return HOST_NAME.sub(r'\1"HOST"', TIME.sub("TIME", UUID.sub("ID", text))).strip()
