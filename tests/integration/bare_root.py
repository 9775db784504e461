"""A bare Debian of this machine's release, as its own installer would begin: made once per machine, and never changed after that."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from tests.integration.image_fixture import cache_directory

ROOT = Path(__file__).parents[2]


def bare_root() -> Path:
    """The directory with it. Half a minute the first time."""
    codename = from_setup("printf %s $codename")
    root = cache_directory() / "roots" / codename
    if root.exists():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=root.parent) as directory:
        options = Path(directory) / "apt.conf"
        options.write_text(apt_options())
        fresh = Path(directory) / "root"
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=apt", "--mode=root", f"--aptopt={options}", codename, fresh, "-"],
            input=debian_sources(),
            check=True,
            text=True,
        )
        fresh.rename(root)
    return root


def debian_sources() -> str:
    """This machine's sources of Debian, and the backports of the same mirror, as they are configured now."""
    return from_setup("debian_sources; backports_line")


def apt_options() -> str:
    """How this machine's apt gets at its sources: proxies and the like."""
    said = subprocess.run(["apt-config", "dump", "Acquire"], check=True, capture_output=True, text=True).stdout
    return "".join(line for line in said.splitlines(keepends=True) if not line.endswith('"";\n'))


def from_setup(command: str) -> str:
    """What a command says that may use what setup/apt.sh defines."""
    done = subprocess.run(
        ["bash", "-euc", f". setup/apt.sh; {command}"],
        cwd=ROOT,
        env=os.environ,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout
