"""One request to a guest's port and its answer, both as streams: nothing is held but what is on its way, and who is slow slows only the other end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from innkeeper.api.body import header_values
from innkeeper.api.body_shortcuts import OFFER_BODY, SEND_NOW, SendNow
from innkeeper.api.errors import ClientDisconnectedError
from innkeeper.api.port_proxy.answer import AnswerParser
from innkeeper.api.port_proxy.fields import HOP_BY_HOP, Fields, connection_options, render
from innkeeper.api.port_proxy.request import Framing, GuestRequest
from innkeeper.api.raw_connection import TAKE_OVER, RawConnection
from innkeeper.api.revocations import takes_over
from innkeeper.control.ports import PortConnection
from innkeeper.errors import BadAnswerError, InnkeeperError, NoAnswerError

# A server that does not know `Expect: 100-continue` waits for the body.
CONTINUE_SECONDS = 1.0

FilterFields = Callable[[Fields], Fields]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a guest may take to begin its answer, and how long neither side may say anything after that."""

    answer_seconds: float
    idle_seconds: float


class _Watch:
    """Cancels a task when nothing has moved for too long."""

    def __init__(self, patience: Patience) -> None:
        self.expired = False
        self._patience = patience
        self._seconds = patience.answer_seconds
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, task: asyncio.Task[None]) -> None:
        self._task = task
        self._check()

    def moved(self) -> None:
        self._last = self._loop.time()

    def answered(self) -> None:
        self._seconds = self._patience.idle_seconds
        self.moved()
        self._check()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        self.stop()
        left = self._last + self._seconds - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check)
        elif self._task is not None:
            self.expired = True
            self._task.cancel()


class Exchange:
    """Carries one request to a connection and its answer back."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        request: GuestRequest,
        connection: PortConnection,
        filter_fields: FilterFields,
        patience: Patience,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._request = request
        self._connection = connection
        self._filter = filter_fields
        self._answer = AnswerParser(method=scope["method"], upgrading=request.upgrade is not None)
        self._watch = _Watch(patience)
        self._continues = asyncio.Event()
        self._body_sent = request.framing is Framing.NONE
        self._receiving = False
        self._send_now: SendNow | None = scope.get(SEND_NOW)

    async def run(self) -> None:
        """Carry the whole of it.

        Raises:
            NoAnswerError, BadAnswerError, GuestError: the guest's server does not do its part. Where the answer has begun it stays unfinished, so that
                the client sees that something is missing.
            ClientDisconnectedError: the client went away.

        """
        await self._connection.send(self._request.head)
        await _both(self._watch, self._carry_answer(), self._carry_body())

    async def _carry_body(self) -> None:
        """The client's body to the guest; after it, until the client is gone. Never returns."""
        chunked = self._request.framing is Framing.CHUNKED
        if self._request.expects_continue:
            try:
                async with asyncio.timeout(CONTINUE_SECONDS):
                    await self._continues.wait()
            except TimeoutError:
                pass
        more = self._request.framing is not Framing.NONE
        if self._request.framing is Framing.LENGTH and OFFER_BODY in self._scope:
            self._scope[OFFER_BODY](self._take_body)
        while True:
            self._receiving = True
            message = await self._receive()
            self._receiving = False
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError
            self._watch.moved()
            body = message.get("body", b"")
            if more and body:
                await self._connection.send(b"%x\r\n%b\r\n" % (len(body), body) if chunked else body)
                self._watch.moved()
            if more and not message.get("more_body", False):
                more = False
                self._body_sent = True
                if chunked:
                    await self._connection.send(b"0\r\n\r\n")

    def _take_body(self, data: memoryview) -> int:
        return self._take_inward(data) if self._receiving else 0

    def _take_inward(self, data: memoryview) -> int:
        """The client's bytes without waking anybody."""
        taken = self._connection.send_now(data)
        if taken:
            self._watch.moved()
        return taken

    def _take_answer(self, data: memoryview) -> int:
        """The guest's body without waking anybody, but for its end."""
        if len(data) >= self._answer.left or self._send_now is None or not self._send_now(data):
            return 0
        self._answer.passed(len(data))
        self._watch.moved()
        return len(data)

    async def _carry_answer(self) -> None:
        answer = self._answer
        started = False
        while not answer.complete:
            data = await self._connection.receive()
            self._watch.moved()
            if not data:
                answer.feed_end()
            body = answer.feed(data)
            if answer.continues or answer.status:
                self._continues.set()
            if not answer.status:
                continue
            if answer.status == 101:
                return
            if not started:
                started = True
                self._watch.answered()
                await self._send({"type": "http.response.start", "status": answer.status, "headers": self._fields()})
                if answer.framing is Framing.LENGTH:
                    self._connection.shortcut(self._take_answer)
            if body:
                await self._send({"type": "http.response.body", "body": body, "more_body": True})
                self._watch.moved()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _fields(self) -> Fields:
        answer = self._answer
        options = connection_options(answer.fields)
        fields = [
            (name, value)
            for name, value in self._filter(answer.fields)
            # The server dates its answers itself.
            if name not in HOP_BY_HOP and name not in options and name not in (b"content-length", b"date")
        ]
        if answer.framing is Framing.LENGTH and answer.status not in (204, 304):
            fields += [(b"content-length", value) for value in header_values(answer.fields, b"content-length")]
        if not self._body_sent and self._request.expects_continue:
            # Whether the body that was announced still comes is the client's choice, so the connection can carry nothing more.
            fields.append((b"connection", b"close"))
        return fields

    @property
    def upgraded(self) -> bool:
        """Whether the guest has agreed to the upgrade; `tunnel` is next."""
        return self._answer.status == 101

    async def tunnel(self) -> None:
        """What follows an upgrade: bytes both ways until both sides have closed. Raises like `run`."""
        answer, wanted = self._answer, self._request.upgrade or b""
        taken = header_values(answer.fields, b"upgrade")
        offered = {word.strip().lower() for word in wanted.split(b",")}
        if len(taken) != 1 or taken[0].strip().lower() not in offered:
            raise BadAnswerError("The server switched to a protocol that nobody asked for.")
        options = connection_options(answer.fields)
        fields = [
            (name, value)
            for name, value in self._filter(answer.fields)
            if name not in HOP_BY_HOP and name not in options and name != b"content-length"
        ]
        head = render(
            b"HTTP/1.1 101 Switching Protocols", [*fields, (b"connection", b"Upgrade"), (b"upgrade", taken[0])]
        )
        self._watch.answered()
        takes_over(self._scope)
        try:
            async with self._scope[TAKE_OVER](head) as client:
                await _both(self._watch, self._tunnel(client))
        except ConnectionError:
            raise ClientDisconnectedError from None

    async def _tunnel(self, client: RawConnection) -> None:
        def take_outward(data: memoryview) -> int:
            if not client.write_now(data):
                return 0
            self._watch.moved()
            return len(data)

        async def inward() -> None:
            client.shortcut(self._take_inward)
            while data := await client.read():
                self._watch.moved()
                await self._connection.send(data)
            await self._connection.send_end()

        async def outward() -> None:
            data = self._answer.beyond or await self._connection.receive()
            self._connection.shortcut(take_outward)
            while data:
                self._watch.moved()
                await client.write(data)
                data = await self._connection.receive()
            client.write_end()

        await _all(inward(), outward())


async def carry(
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    request: GuestRequest,
    connection: PortConnection,
    filter_fields: FilterFields,
    patience: Patience,
) -> None:
    """Carry one request to a connection and its answer back, and what follows an upgrade. Raises like `Exchange.run`."""
    exchange = Exchange(
        scope, receive, send, request=request, connection=connection, filter_fields=filter_fields, patience=patience
    )
    await exchange.run()
    if exchange.upgraded:
        await exchange.tunnel()


async def _both(
    watch: _Watch, work: Coroutine[Any, Any, None], beside: Coroutine[Any, Any, None] | None = None
) -> None:
    """Do the work; what goes on beside it, which only ends by failing, ends with it. Raises NoAnswerError when nothing moves for too long."""
    loop = asyncio.get_running_loop()
    main = loop.create_task(work)
    tasks = [main] if beside is None else [main, loop.create_task(beside)]
    watch.start(main)
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if main not in done:
            failure = tasks[1].exception()
            if not isinstance(failure, InnkeeperError):
                raise failure or ClientDisconnectedError
            # The guest takes no more of the request, and may have said why.
            await asyncio.wait([main])
        try:
            main.result()
        except asyncio.CancelledError:
            if watch.expired:
                raise NoAnswerError from None
            raise
    finally:
        watch.stop()
        await _end(tasks)


async def _all(*works: Coroutine[Any, Any, None]) -> None:
    """Do all of it at once; the first failure ends the rest."""
    tasks = [asyncio.get_running_loop().create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        await _end(tasks)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
