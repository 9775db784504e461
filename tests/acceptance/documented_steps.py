"""The commands of a page as they stand there: blocks ```sh run, each with the block after it, which is what it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from instavm_client import CLIENTS
from server_fixture import INN, Server, plain_environment

DOCS = Path(__file__).parents[2] / "docs"
SECONDS = 120
STEP = re.compile(r"^```sh run\n(.*?)^```\n\n^```(?:json|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What every page's commands begin with stands on one of them.
SETUP = re.compile(r"^```sh setup\n(.*?)^```$", re.MULTILINE | re.DOTALL)
END_OF_STEP = "-- end of step"
# What differs from run to run, and is spelled out on the pages so that people see what it looks like.
UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
TIME = re.compile(r"\b20\d\d-\d\d-\d\dT[0-9:.]+(?:Z|\+00:00)")
VM_ID = re.compile(r"\bvm_[a-z2-7]{20,}\b")
HOST_NAME = re.compile(r'("host": \{\s*"id": "ID",\s*"name": )"[^"]*"')


@dataclass(frozen=True, slots=True)
class Step:
    """Commands of a page, and what they print; `...` stands for anything within a line."""

    commands: str
    printed: str

    def fits(self, said: str) -> bool:
        """Whether that is what the page says."""
        pattern = re.escape(_without_ids(self.printed)).replace(r"\.\.\.", r"[^\n]*?")
        return re.fullmatch(pattern, _without_ids(said)) is not None


def steps_of(page: Path) -> list[Step]:
    """The page's steps, in order."""
    text = page.read_text()
    steps = [Step(*found) for found in STEP.findall(text)]
    assert len(steps) == text.count("```sh run"), f"{page.name}: a block without what it prints"
    return steps


def setup_of(page: Path) -> str:
    """What the commands of the page and its neighbours begin with."""
    (commands,) = SETUP.findall(page.read_text())
    return str(commands)


def run_steps(steps: list[Step], server: Server, folder: Path, *, setup: str = "") -> list[str]:
    """What each step prints when all run in one shell, one after the other, as somebody would paste them; stderr is part of what is seen."""
    commands = "\n".join(f"{step.commands}\nprintf '\\n%s\\n' '{END_OF_STEP}'" for step in steps)
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"exec 2>&1\n{_here(setup, server)}\n{_here(commands, server)}"],
        cwd=folder,
        env={
            **plain_environment(),
            "PATH": f"{CLIENTS}:{INN.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "INNKEEPER_HOME": str(server.home),
            "NO_COLOR": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
    )
    assert ran.returncode == 0, ran.stdout
    return [said.removesuffix("\n") for said in ran.stdout.split(f"\n{END_OF_STEP}\n")[:-1]]


def _here(commands: str, server: Server) -> str:
    return (
        commands.replace("http://127.0.0.1:7070", server.url)
        .replace("localhost:7070", f"localhost:{server.port}")
        .replace("/var/lib/innkeeper", str(server.home))
    )


def _without_ids(text: str) -> str:
    text = re.sub(r"(localhost|127\.0\.0\.1):\d+", r"\1:PORT", VM_ID.sub("VM", TIME.sub("TIME", UUID.sub("ID", text))))
    return HOST_NAME.sub(r'\1"HOST"', text).strip()
