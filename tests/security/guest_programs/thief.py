"""Runs in a guest as its user: looks into every process that appears for descriptors of the agent that it could open, until /tmp/thief.stop exists."""

import contextlib
import json
import os
from pathlib import Path

stop, seen, got = Path("/tmp/thief.stop"), 0, []
own = {str(os.getpid()), str(os.getppid())}
while not stop.exists():
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or process.name in own:
            continue
        with contextlib.suppress(OSError):
            for entry in (process / "fd").iterdir():
                seen += 1
                with contextlib.suppress(OSError):
                    target = str(entry.readlink())
                    if target.startswith(("socket:", "anon_inode:")):
                        os.close(os.open(entry, os.O_RDWR | os.O_NONBLOCK))
                        got.append([str(entry), target])
print(json.dumps([seen, got[:20]]))
