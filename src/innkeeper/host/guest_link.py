"""The daemon's end of the guest link: a unix socket per machine that the agent dials, or that of a microVM's port, which is dialled. The peer is hostile."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from innkeeper.errors import (
    ConflictError,
    FileMissingError,
    ForbiddenError,
    GuestError,
    InstanceFailedError,
    InvalidRequestError,
    LinkLostError,
    PortUnreachableError,
)
from innkeeper.host.linux import unix_socket
from innkeeper.wire.frames import Limits, ProtocolError
from innkeeper.wire.link import Link
from innkeeper.wire.resync import begin_link
from innkeeper.wire.stream import Stream

log = structlog.stdlib.get_logger(__name__)

PROTOCOL_VERSIONS = (1,)
SOCKET_NAME = "agent.sock"
GENERATION = "generation"
ANSWER_POLL_SECONDS = 0.002
# Of a microVM's start, which makes its socket.
START_POLL_SECONDS = 0.005
HELLO_SECONDS = 10.0
# Of requests that wait for a link. A guest on a busy host may be late; one that has let that much time pass, while it ran, has no agent any more.
SILENT_SECONDS = 60.0
# For a guest's answer on its port: it may be frozen, and is dialled anew after that. Who waits for a link has a deadline of his own.
PORT_SECONDS = 3_600.0
SOCKET_BUFFER_BYTES = 1_048_576
# An honest agent sends a few frames a command, and 1,200 a second with a file at 300 MB/s. 20,000 are 8 % of the event loop.
# Credit is given for half of the window at once: each word of it costs the guest a wake-up, some 100 µs in gVisor.
GUEST_LIMITS = Limits(frames_per_second=20_000, grant_step=524_288)
# Of what an agent says about its last link.
LAST_ERROR_CHARACTERS = 200
# Connections that one guest is granted, or that are made to it: at once, and a second from then on. Each costs 0.2 ms; further ones wait.
DIALS_AT_ONCE = 32
DIALS_PER_SECOND = 10
BACKLOG = 16


def guest_error(code: str, message: str) -> Exception:
    """The typed error for an agent's ERROR. What the guest says is quoted, never trusted to be short or polite."""
    text = _printable(message)[:500]
    if code == "not_found":
        return FileMissingError(text or None)
    # Typed, because only the type's code crosses the bus: the API would show a guest's other errors as 503.
    if code == "permission_denied":
        return ForbiddenError(text or None)
    if code in ("no_space", "exists"):
        return ConflictError(text or None)
    if code == "unreachable":
        return PortUnreachableError()
    if code in (
        "bad_request",
        "is_a_directory",
        "not_a_directory",
        "not_a_regular_file",
        "too_large",
    ):
        return GuestInputError(text or code, guest_code=code)
    return GuestError(f"The guest answered {code}: {text}", guest_code=code)


class GuestInputError(InvalidRequestError):
    """The guest refused the request's input."""

    def __init__(self, message: str | None = None, *, guest_code: str = "bad_request") -> None:
        super().__init__(message)
        self.guest_code = guest_code


class _Pace:
    """Whatever connects without end waits for itself, not the daemon for it."""

    def __init__(self) -> None:
        self._allowance, self._at = float(DIALS_AT_ONCE), asyncio.get_running_loop().time()

    async def wait(self) -> None:
        """Count a connection; returns when the next one may come."""
        now = asyncio.get_running_loop().time()
        gained = (now - self._at) * DIALS_PER_SECOND
        self._allowance, self._at = min(DIALS_AT_ONCE, self._allowance + gained) - 1, now
        if self._allowance < 0:
            await asyncio.sleep(-self._allowance / DIALS_PER_SECOND)


class GuestEndpoint:
    """Listens for one machine's agent, or dials it, and keeps its current link.

    Only one link is alive at a time: a further connection while one works is dropped, since anything in the guest that gets to the socket could dial it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._on_link: Callable[[Link], None] | None = None
        # Why the link before this one ended, as a guest says it.
        self.last_error = ""
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self._greeting: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self.agent_version = ""
        self.failure: str | None = None
        self._on_failure: Callable[[str], None] = lambda _: None
        self._ended: str | None = None
        # Seconds in which somebody waited for a link in vain since there was one, the last of them, and whether that is our own doing.
        self._missed_seconds = 0.0
        self._missed_until = 0.0
        self._resting = False
        # Verbs without data that wait for their answer.
        self._asked = 0

    async def listen(self) -> None:
        """Make the directory and its socket, replacing one that an earlier daemon left."""
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        # The agent is root in the guest, and its uids are the host's: no other uid may connect.
        listener = unix_socket.listen(self.directory / SOCKET_NAME, backlog=BACKLOG)
        self._call_back()
        self._listener = listener
        self._accepting = asyncio.get_running_loop().create_task(self._accept_all(listener))

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        pace = _Pace()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, or the dialler was gone already.
                log.warning("a guest's connection could not be taken", error=str(error))
                await asyncio.sleep(1)
                continue
            if self._link is not None and not self._link.closed.done():
                connection.close()
            else:
                await self._take(connection)
            await pace.wait()

    def dial(self) -> None:
        """Dial the port of a microVM, as soon as there is a socket for it in the directory, and again whenever the link breaks.

        One that goes on from a state should find its port open on this side, as it was when that was saved: else the agent looks for it now and then only.
        """
        self._accepting = asyncio.get_running_loop().create_task(self._dial_all())

    async def _dial_all(self) -> None:
        pace = _Pace()
        while not (self.directory / SOCKET_NAME).exists():
            await asyncio.sleep(START_POLL_SECONDS)
        while self._ended is None:
            await pace.wait()
            if self._link is not None:
                await self._link.wait_closed()
            try:
                connection = unix_socket.connect(self.directory / SOCKET_NAME)
            except OSError:
                # QEMU is gone, which its machine's end tells, or has not let go of the last connection yet.
                continue
            try:
                rest = await begin_link(connection, timeout_seconds=PORT_SECONDS)
            except (OSError, TimeoutError):
                connection.close()
            except BaseException as error:
                connection.close()
                if not isinstance(error, ProtocolError):
                    raise
                self._fail(f"The guest agent broke the protocol: {error}")
                return
            else:
                await self._take(connection, rest)

    async def _take(self, connection: socket.socket, received: bytes = b"") -> None:
        """Make a link of a connection on which `received` came already."""
        # A bulk frame at once, and the next one behind it. What the guest sends is bounded by its own buffer, which gVisor lets nobody set.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        loop = asyncio.get_running_loop()
        link = Link(limits=GUEST_LIMITS, opens_odd=True, make_error=guest_error)
        self._link = link
        self._greeting = loop.create_task(self._greet(link))
        try:
            await loop.connect_accepted_socket(lambda: link, connection)
        except BaseException as error:
            connection.close()
            link.close(error if isinstance(error, OSError) else None)
            if not isinstance(error, OSError):
                raise
        if received:
            link.data_received(received)

    async def _greet(self, link: Link) -> None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await link.hello
            version = common_version(hello)
        except (TimeoutError, asyncio.CancelledError):
            link.close(ProtocolError("no hello"))
            return
        except ProtocolError as error:
            link.close(error)
            self._fail(f"The guest agent broke the protocol: {error}")
            return
        if "boot_error" in hello:
            link.close()
            self._fail(_boot_failure(hello["boot_error"]))
            return
        link.send_hello({"protocol": version})
        self.agent_version = str(hello.get("agent", ""))[:64]
        self.last_error = _printable(str(hello.get("last_error", "")))[:LAST_ERROR_CHARACTERS]
        self._missed_seconds = 0.0
        self._arrived.set()
        link.closed.add_done_callback(lambda _: self._link_gone())
        if self._on_link is not None:
            self._on_link(link)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._arrived.set()
        self._on_failure(reason)

    def _miss(self, began: float, timeout_seconds: float) -> None:
        """Count a wait in vain, its own part of the time alone."""
        now = asyncio.get_running_loop().time()
        self._missed_seconds += min(timeout_seconds, now - max(began, self._missed_until))
        self._missed_until = now
        if self._missed_seconds >= SILENT_SECONDS and not self._resting:
            self._fail("The guest agent does not answer any more")

    def _link_gone(self) -> None:
        if self._ended is None:
            self._arrived.clear()

    def on_link(self, callback: Callable[[Link], None]) -> None:
        """Call back with the working link, if there is one, and with every later one."""
        self._on_link = callback
        if self.linked and self._link is not None:
            callback(self._link)

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Call back with the reason once no link will ever work, or now where that is so."""
        self._on_failure = callback
        if self.failure is not None:
            callback(self.failure)

    async def link(self, *, timeout_seconds: float) -> Link:
        """The working link, waiting for the agent to dial in.

        Raises LinkLostError after `timeout_seconds` or when no protocol version fits, InstanceFailedError when the guest has ended.
        """
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._arrived.wait()
        except TimeoutError:
            self._miss(began, timeout_seconds)
            raise LinkLostError("The guest agent did not answer") from None
        if self._ended is not None:
            raise InstanceFailedError(self._ended)
        if self.failure is not None or self._link is None:
            raise LinkLostError(self.failure)
        return self._link

    def give_up(self, reason: str) -> None:
        """The guest has ended: whoever waits for its agent, now or later, hears of it at once."""
        self._ended = reason
        self._arrived.set()

    @property
    def linked(self) -> bool:
        """Whether a link is up."""
        return self._arrived.is_set() and self.failure is None and self._ended is None

    async def request(self, verb: str, params: dict[str, Any], *, timeout_seconds: float) -> dict[str, Any]:
        """One verb without data. Raises GuestError (also for a guest that does not answer in time) or a typed input error."""
        link = await self.link(timeout_seconds=timeout_seconds)
        self._asked += 1
        try:
            return await link.request(verb, params, timeout_seconds=timeout_seconds)
        except TimeoutError:
            raise GuestError(f"The guest did not answer {verb} in time") from None
        finally:
            self._asked -= 1

    async def rest(self, *, timeout_seconds: float) -> None:
        """Have the agent let go of the link until `wake`: nothing is begun on it any more, and what was asked has its answer.

        Programs that are followed are taken up again by whoever follows them; transfers are cut off. Raises GuestError, LinkLostError.
        """
        link = await self.link(timeout_seconds=timeout_seconds)
        # Whoever wants the link waits for the next one: what the agent did not read any more would be lost.
        self._resting = True
        self._arrived.clear()
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._asked:
                    await asyncio.sleep(ANSWER_POLL_SECONDS)
                await link.request("quiesce", {}, timeout_seconds=timeout_seconds)
                await asyncio.shield(link.closed)
        except TimeoutError:
            raise GuestError("The guest agent did not let go of its link in time") from None

    def wake(self) -> None:
        """Call the agent back after `rest`, however that ended."""
        self._resting = False
        # A guest that has ended meanwhile may have taken its directory along.
        with contextlib.suppress(FileNotFoundError):
            self._call_back()
        if self._link is not None and not self._link.closed.done() and self._link.hello.done():
            self._arrived.set()

    def _call_back(self) -> None:
        """Another word in the file by which a resting agent knows that it is wanted: it may also have rested since an earlier daemon, or in another guest."""
        (self.directory / GENERATION).write_text(secrets.token_hex(8))

    async def open(self, verb: str, params: dict[str, Any], *, timeout_seconds: float = 5.0) -> Stream:
        """Open a stream on the working link."""
        return (await self.link(timeout_seconds=timeout_seconds)).open(verb, params)

    async def close(self, *, remove: bool) -> None:
        """Stop listening; with `remove` take the directory away, without it the agent finds the socket again when a new daemon listens."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        if self._listener is not None:
            self._listener.close()
        if self._link is not None:
            self._link.close()
            await self._link.wait_closed()
        if remove:
            shutil.rmtree(self.directory, ignore_errors=True)


def _boot_failure(error: object) -> str:
    """What a guest that could not boot says of it."""
    said = error if isinstance(error, dict) else {}
    step, message = (_printable(str(said.get(name, "")))[:LAST_ERROR_CHARACTERS] for name in ("step", "message"))
    return f"The guest could not boot: {step}: {message}"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def common_version(hello: dict[str, Any]) -> int:
    """The highest protocol version that both ends know.

    Raises:
        ProtocolError: there is none, or the hello makes no sense.

    """
    newest, oldest = hello.get("protocol"), hello.get("min_protocol")
    if not isinstance(newest, int) or not isinstance(oldest, int) or oldest > newest:
        raise ProtocolError("a malformed hello")
    common = [version for version in PROTOCOL_VERSIONS if oldest <= version <= newest]
    if not common:
        raise ProtocolError(
            f"the agent speaks protocol {oldest} to {newest}, this server {PROTOCOL_VERSIONS[0]} to {PROTOCOL_VERSIONS[-1]}"
        )
    return max(common)
