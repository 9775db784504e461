"""`inn terminal`, typed at a real pseudo terminal: what it shows, how it is left, and that one's own terminal is what it was afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest
from server_fixture import INN, Server, fresh, plain_environment, server, until
from tests.integration.daemon_fixture import NEEDS_RUNSC

pytestmark = NEEDS_RUNSC
SECONDS = 60.0
# Without readline, so that the terminal itself echoes.
PLAIN = "exec bash --norc --noediting -i"


@pytest.fixture(scope="module")
def innkeeper(driver: str) -> Iterator[Server]:
    with server("base", driver=driver) as running:
        yield running


@pytest.fixture(scope="module")
def room(innkeeper: Server) -> str:
    made = innkeeper.inn("room", "create", "base", fresh("room"), "--json")
    assert made.returncode == 0, made.stderr
    return f"base/{json.loads(made.stdout)['room_id']}"


class Keyboard:
    """A terminal with a user at it, and `inn` running on it."""

    def __init__(self, innkeeper: Server, *argv: str, rows: int = 33, cols: int = 111) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(rows, cols)
        self.before = termios.tcgetattr(self.slave)
        variables = {**plain_environment(), "INNKEEPER_HOME": str(innkeeper.home), "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", INN, "terminal", *argv],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=variables,
        )
        self.seen = b""

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, text: str, *, after: int = 0) -> int:
        deadline = time.monotonic() + SECONDS
        while (at := self.seen.find(text.encode(), after)) < 0:
            assert time.monotonic() < deadline, self.seen[-2_000:]
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 65_536)
        return at + len(text)

    def press(self, key: str, text: str, *, after: int = 0) -> None:
        """Type a key until something shows: a program that is only just starting has not got the terminal yet."""
        deadline = time.monotonic() + SECONDS
        while True:
            self.type(key)
            again = time.monotonic() + 2
            while time.monotonic() < again:
                if self.seen.find(text.encode(), after) >= 0:
                    return
                if select.select([self.master], [], [], 0.2)[0]:
                    self.seen += os.read(self.master, 65_536)
            assert time.monotonic() < deadline, self.seen[-2_000:]

    @property
    def raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def end(self) -> int:
        """The exit status; the terminal is what it was."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen[-2_000:]
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65_536)
        while select.select([self.master], [], [], 0.2)[0]:
            self.seen += os.read(self.master, 65_536)
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.returncode

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextlib.contextmanager
def typing(innkeeper: Server, *argv: str) -> Iterator[Keyboard]:
    keyboard = Keyboard(innkeeper, *argv)
    try:
        yield keyboard
    finally:
        keyboard.close()


def test_a_shell_its_size_and_its_exit_status(innkeeper: Server, room: str) -> None:
    with typing(innkeeper, "--room", room) as user:
        user.until("$ ")
        user.type("stty size; tty\r")
        user.until("33 111")
        assert user.raw
        user.resize(20, 70)
        user.process.send_signal(signal.SIGWINCH)
        # Until it has got there.
        at, deadline = 0, time.monotonic() + SECONDS
        while b"20 70" not in user.seen:
            assert time.monotonic() < deadline
            user.type("echo; stty size; echo asked\r")
            at = user.until("asked\r\n", after=at)
        user.until("$ ", after=at)
        user.type("exit 9\r")
        assert user.end() == 9


def test_ctrl_c_at_a_prompt_and_resizing(innkeeper: Server, room: str) -> None:
    with typing(innkeeper, "--room", room) as user:

        def ready(mark: str) -> int:
            """At a prompt, behind everything that came before."""
            user.type(f"echo {mark}-$((1+1))\r")
            return user.until("$ ", after=user.until(f"{mark}-2\r\n"))

        at = user.until("$ ")
        # Half a line, thrown away; a program, interrupted; a shell that takes it for itself.
        user.type("echo half-$((1+1))")
        at = user.until("$((1+1))", after=at)
        user.press("\x03", "$ ", after=at)
        at = ready("first")
        # What says that it has begun is what has the terminal then: a shell that is only just starting it would take the key for itself.
        user.type("sh -c 'echo begun; exec sleep 1000'; echo went-$((1+1))\r")
        user.press("\x03", "$ ", after=user.until("begun\r\n", after=at))
        ready("second")
        user.type("trap 'echo caught-$((1+1))' INT\r")
        ready("third")
        user.press("\x03", "caught-2\r\n")
        at = ready("fourth")
        assert b"half-2" not in user.seen and b"went-2" not in user.seen
        # The program that runs hears of the window's new size.
        user.type("trap - INT; bash -c 'trap \"stty size\" WINCH; echo waiting; while :; do sleep 0.1; done'\r")
        at = user.until("waiting\r\n", after=at)
        user.resize(21, 77)
        user.process.send_signal(signal.SIGWINCH)
        user.press("\x03", "$ ", after=user.until("21 77\r\n", after=at))
        ready("fifth")
        user.type("exit 3\r")
        assert user.end() == 3


def test_leaving_it_and_going_back(innkeeper: Server, room: str) -> None:
    with typing(innkeeper, "--room", room, "-c", PLAIN) as user:
        user.until("$ ")
        user.type("x=kept\r")
        user.until("x=kept")
        user.type("\x1d")
        assert user.end() == 0
        at = user.until("--attach ")
        name = user.seen[at:].split()[0].decode()
    listed = innkeeper.inn("terminal", "--room", room, "--list")
    assert name in listed.stdout and "111x33" in listed.stdout
    with typing(innkeeper, "--room", room, "--attach", name) as user:
        user.until("x=kept")
        user.type("echo $x-again\r")
        user.until("kept-again")
        user.type("exit\r")
        assert user.end() == 0
    gone = innkeeper.inn("terminal", "--room", room, "--attach", "nosuch")
    assert gone.returncode == 1 and "Terminal not found" in gone.stderr


def test_it_is_given_back_on_every_way_out(innkeeper: Server, room: str) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        with typing(innkeeper, "--room", room) as user:
            user.until("$ ")
            user.type("echo here\r")
            user.until("here\r\n")
            assert user.raw
            user.process.send_signal(number)
            assert user.end() == 128 + number


COUNT = "stty -echo; n=0; while [ ! -e %s ]; do echo $n; n=$((n+1)); sleep 0.02; done; echo end-$n"


def test_the_connection_comes_back_and_nothing_is_missed(innkeeper: Server, room: str) -> None:
    stop = f"/tmp/{fresh('stop')}"
    with (
        typing(innkeeper, "--room", room, "-c", COUNT % stop) as user,
        typing(innkeeper, "--room", room, "-c", PLAIN) as leaving,
        typing(innkeeper, "--room", room, "-c", PLAIN) as impatient,
    ):
        for other in (leaving, impatient):
            other.until("$ ")
        at = user.until("\n50\r\n")
        os.kill(innkeeper.api_pid(), signal.SIGKILL)
        at = user.until("trying again, Ctrl-C gives up\r\n", after=at)
        assert user.raw
        # The API process comes again, and the program was never gone. Then all of the server goes.
        at = user.until("0\r\n", after=at)
        for other in (leaving, impatient):
            # Until it is there again: what is typed before that is dropped.
            other.press("echo again-$((1+1))\r", "again-2")
        innkeeper.kill()
        at = user.until("trying again", after=at)
        # Nobody has to wait for it.
        for other, key, status, said in (
            (leaving, "\x1d", 0, b"left the terminal running"),
            (impatient, "\x03", 255, b"nobody wanted to wait"),
        ):
            other.until("trying again", after=other.seen.index(b"again-2"))
            assert other.raw
            other.type(key)
            assert other.end() == status
            assert said in other.seen and f"inn terminal --room {room} --attach ".encode() in other.seen
        innkeeper.start()
        user.until("00\r\n", after=at)
        until(lambda: innkeeper.inn("run", *room.split("/"), "--", "touch", stop).returncode == 0)
        assert user.end() == 0
    shown = re.sub(rb"\r\ninn: [^\r]*\r\n", b"", user.seen).decode()
    lines = [line for line in shown.split("\r\n") if line.removeprefix("end-").isdecimal()]
    count = int(lines[-1].removeprefix("end-"))
    assert lines == [*map(str, range(count)), f"end-{count}"]


def test_pipes(innkeeper: Server, room: str) -> None:
    ran = innkeeper.inn("terminal", "--room", room, "-c", "stty -echo; cat; echo; echo over; exit 4", stdin="piped\n")
    assert (ran.returncode, ran.stderr) == (4, "")
    assert "piped" in ran.stdout and "over" in ran.stdout


def test_what_is_refused(innkeeper: Server, room: str) -> None:
    for argv in ((), ("vm_x", "--room", room), ("--room", "base"), ("--room", room, "--detach-key", "q")):
        assert innkeeper.inn("terminal", *argv).returncode == 2, argv
    assert innkeeper.inn("terminal", "--room", room, "--shell", "/bin/nosuch").returncode == 1
