"""A guest's answer, parsed as it comes. The guest is hostile: what can be read in two ways is refused, and nothing endless is collected."""

from __future__ import annotations

from http import HTTPStatus

import httptools

from innkeeper.api.body import header_values
from innkeeper.api.port_proxy.fields import Fields, is_field
from innkeeper.api.port_proxy.request import Framing
from innkeeper.errors import BadAnswerError

# A head, with the interim answers before it; and what may come without bringing a body on: chunk extensions, trailers.
HEAD_MAX_BYTES = 65_536
MAX_FIELDS = 256


class AnswerParser:
    """Takes bytes by `feed` and `feed_end`; `status` is 0 until the head of the final answer is there, `complete` when all of it is."""

    def __init__(self, *, method: str, upgrading: bool) -> None:
        self.status = 0
        self.fields: Fields = []
        self.framing = Framing.NONE
        self.complete = False
        # The guest has said that it wants the body.
        self.continues = False
        # What came after the head of a 101.
        self.beyond = b""
        # What is still to come of a body of known length. It passes the parser by.
        self.left = 0
        self._method = method
        self._upgrading = upgrading
        self._until_close = False
        self._length = 0
        self._interim = False
        self._pieces: list[bytes] = []
        self._fruitless_bytes = 0
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body that these bytes bring. Raises BadAnswerError."""
        if self.complete:
            # More than was announced: nobody's answer.
            return b""
        if self.left:
            body = data[: self.left]
            self.passed(len(body))
            return body
        self._fruitless_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.beyond = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            # What follows a whole answer is nobody's; what the parser says is not for strangers.
            if not self.complete:
                raise BadAnswerError from error
        if self._fruitless_bytes > HEAD_MAX_BYTES and not self.complete:
            raise BadAnswerError("The server's answer has too large a header.")
        body, self._pieces = b"".join(self._pieces), []
        if self.framing is Framing.LENGTH and not self.complete:
            self.left = self._length - len(body)
        return body

    def passed(self, size: int) -> None:
        """Count bytes of a body of known length, `size` of the `left` ones."""
        self.left -= size
        self.complete = not self.left

    def feed_end(self) -> None:
        """The guest has closed its side. Raises BadAnswerError when the answer is not whole."""
        if self._until_close and self.status:
            self.complete = True
        if not self.complete:
            raise BadAnswerError("The server closed the connection before its answer was whole.")

    # --- called by the parser ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer begins, or another one after an interim one."""
        if not self.status:
            self.fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field, or a trailer, which is dropped."""
        if self.status:
            return
        name = name.lower()
        if len(self.fields) >= MAX_FIELDS or not is_field(name, value):
            raise BadAnswerError
        self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is over."""
        if self.status:
            return
        status = self._parser.get_status_code()
        self._interim = status < HTTPStatus.OK and not (
            status == HTTPStatus.SWITCHING_PROTOCOLS and self._upgrading and self._parser.should_upgrade()
        )
        if self._parser.get_http_version() not in ("1.0", "1.1") or not 100 <= status <= 599:
            raise BadAnswerError
        if self._interim:
            if status == HTTPStatus.SWITCHING_PROTOCOLS:
                raise BadAnswerError("The server switched to a protocol that nobody asked for.")
            self.continues = self.continues or status == HTTPStatus.CONTINUE
            return
        self._set_framing()
        self.status = status
        if self._method == "HEAD" or status in (
            HTTPStatus.SWITCHING_PROTOCOLS,
            HTTPStatus.NO_CONTENT,
            HTTPStatus.NOT_MODIFIED,
        ):
            self.complete = True

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self.status and not self.complete:
            self._fruitless_bytes = 0
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was an interim one."""
        if self.status:
            self.complete = True

    def _set_framing(self) -> None:
        lengths, codings = (
            header_values(self.fields, b"content-length"),
            header_values(self.fields, b"transfer-encoding"),
        )
        if codings:
            one_chunked = len(codings) == 1 and codings[0].strip().lower() == b"chunked"
            if lengths or not one_chunked or self._parser.get_http_version() != "1.1":
                raise BadAnswerError
            self.framing = Framing.CHUNKED
        elif lengths:
            if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 18:
                raise BadAnswerError
            self.framing, self._length = Framing.LENGTH, int(lengths[0])
        else:
            self._until_close = True
