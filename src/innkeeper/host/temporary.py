"""Everything of the host's directory that is there only while something is being made: what nobody makes any more was left by a process that was killed."""

from __future__ import annotations

import contextlib
import glob
import shutil
from pathlib import Path

from innkeeper.host.linux.hold import is_held

# Of what takes longer than a moment, whoever makes it has a hold. The files called *.new are written and renamed at once. Journals are left out: there may
# be ten thousand of them, and the next writer goes over what a killed one left.
TEMPORARY = (
    "*.new",
    "run/*.new",
    "agent/*/.*.new",
    "machines/*/*.new",
    "instances/*/*.new",
    "images/*.new",
    "images/sources/*.new",
    "kernels/*/*.new",
    "pool/steps/*.new",
    ".inventory-*",
    ".pool-*",
    "pool/.reflink-*",
    # Held:
    ".inn-probe-*",
    "images/.build-*",
    "pool/steps/.copy-*",
    "pool/checkpoints/.draft-*",
    "pool/suspended/.draft-*",
    "pool/machine-templates/.draft-*",
    "pool/volumes/.draft-*",
    "pool/templates/.template-*",
    "kernels/.fetch-*",
)


def abandoned(host: Path) -> list[Path]:
    """Half-made files and folders that nobody holds, below the host's directory. One that is written and renamed at this very moment may be among them."""
    # Not Path.glob: that one raises when a folder goes away while it looks.
    found = (host / name for pattern in TEMPORARY for name in glob.glob(pattern, root_dir=host))  # noqa: PTH207
    return [path for path in found if not is_held(path)]


def remove(path: Path) -> None:
    """Remove one; harmless when it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
