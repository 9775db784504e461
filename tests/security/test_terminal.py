"""`inn` on a terminal, before names and output that a guest chose: nothing of them reaches the terminal as itself, but text, lines and colours."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import threading
import unicodedata
from pathlib import Path

import pytest
from server_fixture import INN, Api, Room, Server, plain_environment

HOSTILE = {
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "answer": "\x1b[6n\x1b[c",
    "cursor": "\x1b[2J\x1b[1;1H\x1b[?1049h",
    "c1": "\x9b31m\x90q\x9c",
    "newline": "a\nROOM  owned by nobody\rinn: done",
    "bell": "\x07\x08\x7f\x0c",
    "bidi": "invoice\u202egpj.exe\u2066\u2069\u200f",
    "invisible": "pass\u200bword\u2060\ufeff\u00ad",
    "tags": "a\U000e0041\U000e0042",
    "link": "\x1b]8;;http://evil.test\x1b\\click\x1b]8;;\x1b\\",
    "device": "\x1bP$q\x1b\\\x1b_x\x1b\\\x1b^y\x1b\\\x1bc",
    "markup": "[bold red]not ours[/] :warning:",
    "percent": "%1b%0a",
}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def on_a_terminal(innkeeper: Server, *argv: str) -> str:
    """What `inn` writes to the terminal that both its standard output and error are."""
    master, slave = pty.openpty()
    variables = {
        **plain_environment(),
        "INNKEEPER_HOME": str(innkeeper.home),
        "TERM": "xterm-256color",
        "COLUMNS": "4000",
    }
    process = subprocess.Popen([INN, *argv], stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=variables)
    os.close(slave)
    written = bytearray()

    def read() -> None:
        try:
            while data := os.read(master, 65536):
                written.extend(data)
        except OSError:
            pass  # the last one closed the terminal

    reader = threading.Thread(target=read)
    reader.start()
    try:
        process.wait(60)
    finally:
        process.kill()
        reader.join()
        os.close(master)
    return written.decode("utf-8", "replace")


def harmful(text: str, *, output: bool = False) -> list[str]:
    """Characters that are neither text, line ends nor part of a colour. In a command's output, joiners within words and emoji are text."""
    harmless = "\r\n\t" + ("\u200c\u200d" if output else "")
    rest = COLOUR.sub("", text)
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp") if output else ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return sorted(
        {f"U+{ord(letter):04X}" for letter in rest if letter not in harmless and unicodedata.category(letter) in kinds}
    )


def test_the_measure_finds_what_it_should() -> None:
    for name, text in HOSTILE.items():
        assert name in ("markup", "percent") or harmful(text + "\x1b"), name


@pytest.fixture(scope="module")
def hostile_room(attacker: Room) -> Room:
    """A room with a file under every hostile name, whose last command printed all of them as well."""
    made = "import os, pathlib\nfor number, name in enumerate(NAMES): pathlib.Path(f'{number}-{name}').write_text(name)\nos.makedirs('deep/' + NAMES[0])\n"
    names = [text.replace("/", "-") for text in HOSTILE.values()]
    attacker.put("/tmp/names.py", f"NAMES = {names!a}\n{made}print(*NAMES, sep='|')\n".encode())
    return attacker


def test_the_list_of_changes_and_the_output(innkeeper: Server, hostile_room: Room) -> None:
    shown = on_a_terminal(innkeeper, "run", "base", hostile_room.room_id, "--", "python3", "/tmp/names.py")
    changes = [line for line in shown.splitlines() if "/home/user/" in line]
    assert len(changes) >= len(HOSTILE), shown
    assert harmful("".join(changes)) == []
    assert harmful(shown, output=True) == []
    # Their letters are there: it was escaped, not dropped.
    assert "owned" in shown and "gpj.exe" in shown and "[bold red]not ours" in shown


def test_copying(innkeeper: Server, hostile_room: Room, tmp_path: Path) -> None:
    hostile_room.output(
        "ln -sf /etc/passwd \"$(printf 'li\\033]0;x\\007nk')\"; mkfifo \"$(printf 'fi\\nfo\\342\\200\\256')\"; true"
    )
    shown = on_a_terminal(innkeeper, "cp", f"base/{hostile_room.room_id}:/home/user", str(tmp_path / "copy"))
    assert "skipped" in shown and harmful(shown) == [], shown
    for path in (tmp_path / "copy").rglob("*"):
        assert path.resolve().is_relative_to(tmp_path.resolve())
    for wrong in ("no\x1b]0;x\x07such", "\u202efile"):
        assert (
            harmful(on_a_terminal(innkeeper, "cp", f"base/{hostile_room.room_id}:/home/user/{wrong}", str(tmp_path)))
            == []
        )


def test_lists(innkeeper: Server, api: Api, base: str) -> None:
    rooms = [
        api.room(base, f"r-{name}-{text}".replace("/", "-"))
        for name, text in HOSTILE.items()
        if name in ("bidi", "invisible")
    ]
    made = []
    for room in rooms:
        answer = room.client.post(room.path)
        assert answer.status_code in (200, 400, 422), answer.text
        made += [room] if answer.status_code == 200 else []
    for argv in (("room", "list"), ("audit",), ("profile", "list"), ("host", "list"), ("image", "list")):
        shown = on_a_terminal(innkeeper, *argv)
        assert len(shown) > 20 and harmful(shown) == [], (argv, harmful(shown))
    for room in made:
        assert harmful(on_a_terminal(innkeeper, "room", "show", "base", room.room_id)) == []
        room.delete()


def test_the_servers_log(innkeeper: Server, hostile_room: Room) -> None:
    question = (
        "import socket, struct\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3)\n"
        "server = open('/etc/resolv.conf').read().split()[1]\n"
        "label = '\\x1b]0;x\\x07\\nforged\\u202e'.encode()\n"
        "s.sendto(struct.pack('!HHHHHH', 7, 256, 1, 0, 0, 0) + bytes([len(label)]) + label + b'\\x06rebind\\x04test\\0\\0\\1\\0\\1', (server, 53))\n"
        "s.recv(2000)\n"
    )
    hostile_room.put("/tmp/ask.py", question.encode())
    hostile_room.run("python3 /tmp/ask.py")
    hostile_room.file("/home/user/\x1b]0;x\x07\u202e")
    log = innkeeper.log()
    assert harmful(log) == [], [line for line in log.splitlines() if harmful(line)][:3]
