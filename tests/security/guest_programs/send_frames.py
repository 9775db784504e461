"""Runs in a microVM, as its root: sends the Ethernet frames of the JSON file argv[1] (hexadecimal) as they are, and prints how many went out."""

import json
import socket
import sys
import time
from pathlib import Path

sent = 0
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
    sock.bind(("eth0", 0))
    for text in json.loads(Path(sys.argv[1]).read_text()):
        sent += sock.send(bytes.fromhex(text)) > 0
        time.sleep(0.002)
print(sent)
