import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.cli.printing import human_size, print_json, visible, visible_lines
from innkeeper.cli.terminal_filter import TerminalFilter


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \u00e9 \N{SNOWMAN}", "plain \u00e9 \N{SNOWMAN}"),
        ("\x1b]52;c;eA==\x07", "\\x1b]52;c;eA==\\x07"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x7f\x9b31m", "\\x7f\\x9b31m"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\udcff", "\\udcff"),
        ("pass\u200bword\u2060\u00ad", "pass\\u200bword\\u2060\\xad"),
        ("a\U000e0041", "a\\U000e0041"),
        ("a\u00a0b\ue000", "a\\xa0b\\ue000"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


@given(st.text())
def test_visible_text_is_one_harmless_line(text):
    shown = visible(text)
    assert len(shown.splitlines()) <= 1
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in shown)
    shown.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\r\n", "a\tb\r\n"),
        ("\N{FAMILY}\u200d\N{GIRL} 1\u00a0000 \ue0b0", "\N{FAMILY}\u200d\N{GIRL} 1\u00a0000 \ue0b0"),
        ("\u200b\u202e\U000e0041\x9b\udcff", "\\u200b\\u202e\\U000e0041\\x9b\\udcff"),
    ],
)
def test_output_stays_as_it_is_but_for_what_cannot_be_seen(text, shown):
    assert visible_lines(text) == shown


def test_json_carries_no_control_character(capsys):
    print_json({"x": "\x7f\x9b\x1b\u2028"})
    out = capsys.readouterr().out
    assert out.isascii() and "\x7f" not in out and "\x1b" not in out


def test_colours_pass_the_terminal_filter_and_are_taken_back():
    filtered = TerminalFilter()
    assert filtered.feed("\x1b[1;31mred\n") + filtered.end() == "\x1b[1;31mred\n\x1b[0m"


def test_other_sequences_become_text():
    assert TerminalFilter().feed("\x1b[2J\x1b]0;t\x07a\rb\t\x08") == "\\x1b[2J\\x1b]0;t\\x07a\rb\t\\x08"


@given(st.text(alphabet="\x1b[]0;31mJ\x07\n a"), st.integers(1, 4))
def test_where_the_pieces_are_cut_does_not_matter(text, size):
    whole, pieces = TerminalFilter(), TerminalFilter()
    expected = whole.feed(text) + whole.end()
    assert "".join(pieces.feed(text[i : i + size]) for i in range(0, len(text), size)) + pieces.end() == expected


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (12_485, "12.5 kB"), (5_000_000_000_000, "5000.0 GB")]
)
def test_human_size(size, text):
    assert human_size(size) == text
