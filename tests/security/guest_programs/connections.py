"""Runs in a guest: opens connections to argv[1]:80 for argv[3] seconds, keeping (`hold`) or closing (`churn`) them, and prints opened and refused."""

import json
import resource
import socket
import sys
import time

address, way, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
opened = refused = 0
kept: list[socket.socket] = []
end = time.monotonic() + seconds
while time.monotonic() < end and refused < 100_000:
    try:
        sock = socket.create_connection((address, 80), timeout=2)
    except OSError:
        refused += 1
        if way == "churn":
            time.sleep(0.002)
        continue
    opened += 1
    if way == "hold":
        kept.append(sock)
    else:
        sock.close()
print(json.dumps([opened, refused]))
