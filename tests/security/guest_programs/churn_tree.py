"""Runs in a guest: keeps changing a tree below argv[1] until argv[1].stop exists: renames, links in place of directories, deep and wide directories."""

import contextlib
import os
import random
import shutil
import sys
from pathlib import Path

root = Path(sys.argv[1])
stop = Path(f"{root}.stop")
root.mkdir(exist_ok=True)
places = [root / f"d{number}" for number in range(8)]
for place in places:
    (place / "a" / "b" / "c").mkdir(parents=True, exist_ok=True)
Path(f"{root}.made").touch()
count = 0
while not stop.exists():
    count += 1
    one, other = random.sample(places, 2)
    with contextlib.suppress(OSError):
        match random.randrange(6):
            case 0:
                one.rename(root / "between")
                other.rename(one)
                (root / "between").rename(other)
            case 1:
                shutil.rmtree(one / "a", ignore_errors=True)
                (one / "a").symlink_to("/etc")
            case 2:
                (one / "a").unlink()
                (one / "a" / "b" / "c").mkdir(parents=True)
            case 3:
                (one / "a").rename(other / f"moved{count % 50}")
            case 4:
                (one / "a" / "b" / f"f{count % 100}").write_text("x" * (count % 1000))
            case 5:
                os.link("/etc/hostname", one / f"h{count % 50}")
