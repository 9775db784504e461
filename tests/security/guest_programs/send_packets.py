"""Runs in a guest, in a user namespace of its own: sends the IPv4 packets of the JSON file argv[1] (hexadecimal) with the headers that they have, and
prints how many went out.
"""

import json
import socket
import sys
import time
from pathlib import Path

sent = 0
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    for text in json.loads(Path(sys.argv[1]).read_text()):
        packet = bytes.fromhex(text)
        try:
            sent += sock.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0)) > 0
        except OSError:
            continue
        time.sleep(0.002)
print(sent)
