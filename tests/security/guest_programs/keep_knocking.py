"""Runs in a guest: tries each address:port of argv[2:] again and again, and keeps in the file argv[1] how often each was reached and was not."""

import json
import socket
import sys
import time
from pathlib import Path

report, targets = Path(sys.argv[1]), sys.argv[2:]
counts = {target: [0, 0] for target in targets}
while True:
    for target in targets:
        address, _, port = target.partition(":")
        try:
            socket.create_connection((address, int(port)), timeout=1).close()
            counts[target][0] += 1
        except OSError:
            counts[target][1] += 1
    beside = report.with_suffix(".new")
    beside.write_text(json.dumps(counts))
    beside.replace(report)
    time.sleep(0.02)
