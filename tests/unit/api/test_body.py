from typing import Any

import pytest

from innkeeper.api.body import check_json_content_type, read_body, read_json_body, stream_body
from innkeeper.api.errors import ClientDisconnectedError
from innkeeper.errors import InvalidRequestError, PayloadTooLargeError

pytestmark = pytest.mark.anyio


def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "headers": list(headers)}


def receiving(*chunks: bytes, disconnect: bool = False) -> Any:
    messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    if disconnect:
        messages.append({"type": "http.disconnect"})
    elif messages:
        messages[-1]["more_body"] = False

    async def receive() -> Any:
        return messages.pop(0)

    return receive


async def test_a_body_in_pieces_is_whole() -> None:
    assert await read_body(scope(), receiving(b"ab", b"", b"c"), max_bytes=3) == b"abc"


@pytest.mark.parametrize("chunks", [(b"abcd",), (b"ab", b"cd"), (b"ab", b"c", b"d", b"")])
async def test_a_body_is_counted_however_it_comes(chunks: tuple[bytes, ...]) -> None:
    with pytest.raises(PayloadTooLargeError):
        await read_body(scope(), receiving(*chunks), max_bytes=3)


async def test_a_declared_length_is_believed_when_it_is_too_large() -> None:
    with pytest.raises(PayloadTooLargeError):
        await read_body(scope((b"content-length", b"4")), receiving(), max_bytes=3)


async def test_a_client_that_goes_away_is_noticed() -> None:
    with pytest.raises(ClientDisconnectedError):
        await read_body(scope(), receiving(b"a", disconnect=True))
    with pytest.raises(ClientDisconnectedError):
        async for _ in stream_body(scope(), receiving(b"a", disconnect=True), max_bytes=9):
            pass


async def test_a_stream_is_counted_while_it_flows() -> None:
    seen = []
    with pytest.raises(PayloadTooLargeError):
        async for chunk in stream_body(scope(), receiving(b"ab", b"cd"), max_bytes=3):
            seen.append(chunk)  # noqa: PERF401
    assert seen == [b"ab"]


@pytest.mark.parametrize(
    "value", [b"application/json", b"Application/JSON; charset=UTF-8", b'application/json;charset="utf-8"']
)
def test_json_in_utf8_is_accepted(value: bytes) -> None:
    check_json_content_type(scope((b"content-type", value)))


@pytest.mark.parametrize(
    "values",
    [(), (b"application/json", b"application/json"), (b"text/plain",), (b"application/json; charset=latin-1",), (b"",)],
)
def test_other_content_types_are_refused(values: tuple[bytes, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="Content-Type"):
        check_json_content_type(scope(*((b"content-type", value) for value in values)))


async def test_an_empty_body_needs_no_content_type() -> None:
    assert await read_json_body(scope(), receiving(b"")) == b""
