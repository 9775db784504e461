import json

import pytest

from innkeeper.api.sse import frame, wants_events


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (b"text/event-stream", True),
        (b"application/json, text/event-stream;q=0.5", True),
        (b"TEXT/EVENT-STREAM", True),
        (b"*/*", False),
        (b"text/event-stream;q=0", False),
        (b"application/json", False),
    ],
)
def test_accept(accept: bytes, wanted: bool) -> None:
    assert wants_events([(b"accept", accept)]) is wanted


def test_a_frame_has_one_data_line_whatever_the_text() -> None:
    text = "a\nb\r\n\u2028\0"
    lines = frame("output", {"data": text}).split(b"\n")
    assert lines[0] == b"event: output"
    assert json.loads(lines[1].removeprefix(b"data: ")) == {"data": text}
    assert lines[2:] == [b"", b""]
