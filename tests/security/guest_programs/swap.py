"""Runs in a guest: swaps what the path argv[1] is, as fast as it can, until argv[1].stop exists: a file, links to argv[2:], a FIFO, nothing."""

import os
import sys
from pathlib import Path

path, targets = Path(sys.argv[1]), sys.argv[2:]
fresh, stop = Path(f"{path}.new"), Path(f"{path}.stop")


def harmless() -> None:
    fresh.write_text("harmless")
    fresh.replace(path)


Path(f"{path}.made").touch()
while not stop.exists():
    for target in targets:
        fresh.symlink_to(target)
        fresh.replace(path)
        harmless()
        path.unlink()
        os.mkfifo(fresh)
        fresh.replace(path)
        harmless()
