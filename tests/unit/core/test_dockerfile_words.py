from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.core.dockerfile_words import EXPANDED_MAX, WordError, expand, key_values, split_words

VARIABLES = {"A": "one", "B": "two words", "EMPTY": "", "N": "A"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x$A-y", "xone-y"),
        ("${A}b", "oneb"),
        ("$MISSING.", "."),
        ("${MISSING:-d}", "d"),
        ("${EMPTY:-d}", "d"),
        ("${EMPTY-d}", ""),
        ("${A:+other}", "other"),
        ("${EMPTY:+other}", ""),
        ("${EMPTY+other}", "other"),
        ("${MISSING:-${A}-$B}", "one-two words"),
        ("${MISSING:-${MISSING:-deep}}", "deep"),
        (r"\$A \\ \x", r"$A \ x"),
        ("'$A' \"$A\"", "$A one"),
        (r'"\$A \" \x"', r'$A " \x'),
        ("a$", "a$"),
        ("$1", "$1"),
        ("a'b c'd", "ab cd"),
    ],
)
def test_variables_quotes_and_escapes(text: str, expected: str) -> None:
    assert expand(text, VARIABLES, "\\") == expected


@pytest.mark.parametrize("text", ["${A", "${}", "${A#x}", "${A/b/c}", "'a", '"a', "${A:=x}", "${A:?x}", "${1}"])
def test_what_cannot_be_replaced_is_refused(text: str) -> None:
    with pytest.raises(WordError):
        expand(text, VARIABLES, "\\")


def test_in_a_here_document_quotes_mean_themselves() -> None:
    assert expand("\"$A\" '$A' \\$A \\n", VARIABLES, "\\", quotes=False) == "\"one\" 'one' $A \\n"


def test_another_escape_character() -> None:
    assert expand("c:\\x`$A", VARIABLES, "`") == "c:\\x$A"


def test_what_grows_without_end_is_refused() -> None:
    with pytest.raises(WordError, match="grows"):
        expand("$A" * 10, {"A": "x" * (EXPANDED_MAX // 5)}, "\\")
    with pytest.raises(WordError, match="nested"):
        expand("${X:-" * 30 + "}" * 30, {}, "\\")


def test_words_are_cut_outside_of_quotes() -> None:
    assert split_words(r"a  'b c' d\ e " + '"f g"h', "\\") == ["a", "'b c'", r"d\ e", '"f g"h']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1 b=$A", [("a", "1"), ("b", "one")]),
        ("a='x y' \"b c\"=d", [("a", "x y"), ("b c", "d")]),
        ("a=", [("a", "")]),
        ("a=b=c", [("a", "b=c")]),
        ("path /a:$A  b ", [("path", "/a:one  b")]),
    ],
)
def test_pairs_in_both_forms(text: str, expected: list[tuple[str, str]]) -> None:
    assert key_values(text, "\\", VARIABLES) == expected


@pytest.mark.parametrize("text", ["a", "a=1 b", "=x", "''=x"])
def test_pairs_that_are_none(text: str) -> None:
    with pytest.raises(WordError):
        key_values(text, "\\", VARIABLES)


@given(st.text(max_size=80), st.sampled_from(["\\", "`"]), st.booleans())
def test_any_text_is_replaced_or_refused(text: str, escape: str, quotes: bool) -> None:
    try:
        expand(text, VARIABLES, escape, quotes=quotes)
        split_words(text, escape)
    except WordError:
        pass


@given(st.text(st.characters(exclude_characters="$\\`'\""), max_size=80))
def test_text_without_marks_stays_as_it_is(text: str) -> None:
    assert expand(text, VARIABLES, "\\") == text


@given(st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), st.text(max_size=20), min_size=1))
def test_values_are_taken_as_they_are_and_never_read_again(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        assert expand(f"<${{{name}}}>", variables, "\\") == f"<{value}>"
