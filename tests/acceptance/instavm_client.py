"""The `instavm` package as its users have it: its command line, and its SDK in a process of its own, against a server of the tests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLIENTS = Path(__file__).parents[2] / ".venv" / "clients" / "bin"
SECONDS = 120
# What a script begins with: `client` is logged in, `answer` is what the test gets.
_PROLOGUE = """\
import json, sys
from instavm import InstaVM
import instavm
url, key, words = json.loads(sys.stdin.readline())
client = InstaVM(api_key=key, base_url=url, auto_start_session=False)
answer = None
"""
_EPILOGUE = "\nprint('\\n' + json.dumps(answer))\n"


@dataclass
class Instavm:
    """A user of a server: where it is, a key, and a home of their own for what the command line keeps."""

    url: str
    api_key: str | None
    home: Path

    def cli(
        self, *words: str, stdin: str | None = None, env: Mapping[str, str] | None = None, seconds: float = SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run `instavm words…`."""
        return subprocess.run(
            [CLIENTS / "instavm", *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env={**self.environment(), **(env or {})},
        )

    def ok(self, *words: str, **more: Any) -> str:
        """What a command line that must succeed printed."""
        done = self.cli(*words, **more)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def json(self, *words: str, **more: Any) -> Any:
        """The parsed answer of a command line with `--json`."""
        return json.loads(self.ok(*words, "--json", **more))

    def sdk(self, script: str, *words: Any, seconds: float = SECONDS) -> Any:
        """What a script of the SDK left in `answer`. It finds `client` (without a session) and `words`."""
        done = subprocess.run(
            [CLIENTS / "python", "-c", _PROLOGUE + script + _EPILOGUE],
            input=json.dumps([self.url, self.api_key, words]) + "\n",
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=self.environment(),
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    def environment(self) -> dict[str, str]:
        """The environment of both: nothing of the tests' own but the path."""
        known = {"PATH": os.environ["PATH"], "HOME": str(self.home), "INSTAVM_BASE_URL": self.url, "NO_COLOR": "1"}
        return known if self.api_key is None else {**known, "INSTAVM_API_KEY": self.api_key}
