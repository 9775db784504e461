from hypothesis import given
from hypothesis import strategies as st

from innkeeper.api.utf8 import OUTPUT_MAX_BYTES, Utf8Pieces, output_text, whole_characters


@given(st.text(), st.integers(min_value=0, max_value=4))
def test_a_cut_never_leaves_half_a_character(text: str, back: int) -> None:
    data = text.encode("utf-8", "surrogatepass") if text.isascii() else text.encode("utf-8", "ignore")
    cut = data[: max(0, len(data) - back)]
    kept = whole_characters(cut)
    assert cut.startswith(kept)
    assert len(cut) - len(kept) <= 3
    kept.decode()


def test_bytes_that_are_not_utf8_stay() -> None:
    assert whole_characters(b"a\x80\x80\x80\x80") == b"a\x80\x80\x80\x80"
    assert whole_characters(b"a\xff") == b"a"
    assert whole_characters(b"") == b""


def test_exactly_one_newline_is_removed() -> None:
    assert output_text(b"a\n\n", truncated=False) == "a\n"
    assert output_text(b"\n", truncated=False) == ""
    assert output_text(b"a\r\n", truncated=False) == "a\r"
    assert output_text(b"\x00\xff\n", truncated=False) == "\x00\N{REPLACEMENT CHARACTER}"


def test_a_truncated_output_ends_with_a_whole_character() -> None:
    data = b"x" * (OUTPUT_MAX_BYTES - 1) + "é".encode()
    assert output_text(data, truncated=True) == "x" * (OUTPUT_MAX_BYTES - 1)


@given(st.text(), st.integers(min_value=1, max_value=5))
def test_pieces_are_the_whole(text: str, size: int) -> None:
    data = text.encode("utf-8", "ignore")
    pieces = Utf8Pieces()
    parts = [pieces.feed(data[i : i + size]) for i in range(0, len(data), size)]
    assert "".join(parts) + pieces.end() == data.decode()


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    pieces = Utf8Pieces()
    assert pieces.feed(b"a\xe2\x98") == "a"
    assert pieces.end() == "\N{REPLACEMENT CHARACTER}"
