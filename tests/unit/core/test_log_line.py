import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.core.log_line import LINE_CHARACTERS_MAX, LineSplitter, LogLine, LogSource, Severity, line_from_wire


def split(pieces):
    splitter = LineSplitter()
    return [line for piece in pieces for line in splitter.feed(piece)] + splitter.end()


def test_lines_end_at_newlines_and_lose_one_carriage_return():
    assert split([b"one\ntwo\r\n\nthree\r\r\n", b"\rprogress\rmore\nrest"]) == [
        "one",
        "two",
        "",
        "three\r",
        "\rprogress\rmore",
        "rest",
    ]
    assert split([]) == split([b""]) == []


def test_characters_that_come_in_pieces_stay_whole_and_bytes_that_are_none_are_replaced():
    assert split([b"gr\xc3", b"\xbc\xc3\x9fe\n\xff\xfe", b"\x00\x1b[31m\xe2\x82"]) == [
        "grüße",
        "\ufffd\ufffd\0\x1b[31m\ufffd",
    ]


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_how_the_bytes_are_cut_makes_no_difference(data, cuts):
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert split([data[a:b] for a, b in itertools.pairwise(edges)]) == split([data])


@pytest.mark.parametrize("step", [1_000, LINE_CHARACTERS_MAX, 70_000])
def test_a_line_without_end_becomes_several_and_is_never_kept(step):
    splitter, found = LineSplitter(), []
    data = b"x" * 70_000 + b"\ny\n"
    for at in range(0, len(data), step):
        found += splitter.feed(data[at : at + step])
    assert [len(line) for line in found] == [LINE_CHARACTERS_MAX] * 4 + [70_000 - 4 * LINE_CHARACTERS_MAX, 1]
    assert splitter.end() == []
    splitter.feed(b"z" * 1_000_000)
    assert len(splitter.end()[0]) <= LINE_CHARACTERS_MAX


def test_a_line_comes_back_from_the_wire():
    line = LogLine(7, 1.5, LogSource.STDERR, Severity.WARNING, 'a "b"\n\0\u2028')
    assert line_from_wire(line.to_wire()) == line
    for bad in (None, [], [1, 2.0, "stdout", "info"], ["1", 2.0, "stdout", "info", ""], [1, 2.0, "tty", "info", ""]):
        with pytest.raises(ValueError):
            line_from_wire(bad)
