from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.core.dockerfile import MAX_BYTES, MAX_INSTRUCTIONS, MAX_STAGES, DockerfileError, parse


def names(text: str) -> list[tuple[int, str, str]]:
    return [(i.line, i.name, i.text) for stage in parse(text).stages for i in stage.instructions]


def test_instructions_have_the_line_on_which_they_begin() -> None:
    assert names("# hello\n\nFROM base\nRUN a\n\n# b\nrun\tc  d\n") == [(4, "RUN", "a"), (7, "RUN", "c  d")]


def test_a_line_goes_on_after_a_backslash_over_comments_and_empty_lines() -> None:
    text = "FROM base\nRUN a \\\n# not part of it\n\n  && b \\  \n  && c\nRUN d\n"
    assert names(text) == [(2, "RUN", "a   && b   && c"), (7, "RUN", "d")]


def test_the_escape_directive_changes_the_character_and_only_at_the_top() -> None:
    parsed = parse("# escape=`\nFROM base\nRUN a `\n b\\\n")
    assert parsed.escape == "`"
    assert parsed.stages[0].instructions[0].text == "a  b\\"
    assert parse("FROM base\n# escape=`\nRUN a\n").escape == "\\"
    assert parse("# just words\n# escape=`\nFROM base\n").escape == "\\"


def test_crlf_and_a_byte_order_mark_are_taken_away() -> None:
    assert names("\ufeffFROM base\r\nRUN a \\\r\n b\r\n") == [(2, "RUN", "a  b")]


def test_stages_have_names_and_arguments_may_stand_before_them() -> None:
    parsed = parse("ARG V=1\nFROM base:$V AS Build\nRUN a\nFROM scratch\nCOPY --from=build /a /b\n")
    assert [i.text for i in parsed.arguments] == ["V=1"]
    assert [(s.line, s.image, s.name) for s in parsed.stages] == [(2, "base:$V", "build"), (4, "scratch", None)]
    assert parsed.stages[1].instructions[0].flags == {"from": "build"}


def test_here_documents_end_at_their_names() -> None:
    text = "FROM base\nRUN cat <<A <<-'B'\none $X\n# no comment\nA\n\t\ttwo \\\n\tB\nRUN c\n"
    first, second = parse(text).stages[0].instructions
    assert [(d.name, d.content, d.expand) for d in first.documents] == [
        ("A", "one $X\n# no comment\n", True),
        ("B", "two \\\n", False),
    ]
    assert (second.line, second.text) == (8, "c")


@pytest.mark.parametrize(
    "line", ["RUN echo '<<A'", 'RUN echo "<<A"', "RUN echo \\<<A", "RUN cat <<<A", "RUN echo 1 << 2"]
)
def test_what_is_quoted_or_no_here_document_begins_none(line: str) -> None:
    assert parse(f"FROM base\n{line}\n").stages[0].instructions[0].documents == ()


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "there is no FROM"),
        ("RUN a", 1, "before the first FROM"),
        ("FROM base\n\nVOLUME /x", 3, "VOLUME: not an instruction"),
        ("FROM base\nHEALTHCHECK NONE", 2, "HEALTHCHECK"),
        ("FROM base\nONBUILD RUN a", 2, "ONBUILD"),
        ("FROM base\nRUN --mount=type=cache,target=/x a", 2, "RUN --mount: not supported"),
        ("FROM base\nRUN a \\\n  b\nCOPY --link a b", 4, "COPY --link"),
        ("FROM base\nADD --from=x a b", 2, "ADD --from"),
        ("FROM --platform=linux/arm64 base", 1, "FROM --platform"),
        ("FROM base\nCOPY --from= a b", 2, "--from: wants one value"),
        ("FROM base\nCOPY --chown=1 --chown=2 a b", 2, "--chown: wants one value"),
        ("FROM base\nRUN", 2, "RUN needs an argument"),
        ("FROM base\nRUN cat <<EOF\nx\n", 2, "the here-document EOF has no end"),
        ("FROM a b", 1, "FROM wants"),
        ("FROM a AS -b", 1, "not a name for a stage"),
        ("FROM a AS b\nFROM c as B", 2, "a stage b already"),
        ("# escape=x\nFROM base", 1, "escape is either"),
        ("# escape=`\n# escape=`\nFROM base", 2, "given twice"),
        ("FROM base\nRUN a\0b", 2, "NUL"),
        ("x" * (MAX_BYTES + 1), 1, "larger than"),
        ("FROM base\n" + "RUN a\n" * MAX_INSTRUCTIONS, MAX_INSTRUCTIONS + 1, "more than"),
        ("FROM base\n" * (MAX_STAGES + 1), MAX_STAGES + 1, "stages"),
    ],
)
def test_what_is_not_understood_is_an_error_that_names_the_line(text: str, line: int, says: str) -> None:
    with pytest.raises(DockerfileError, match=says) as caught:
        parse(text)
    assert caught.value.line == line
    assert f"line {line}:" in caught.value.message


def test_the_exec_form_is_json_and_everything_else_a_shell_line() -> None:
    lines = ['RUN ["a", "b c"]', "RUN [ -f x ] && y", "RUN ['a']", 'RUN ["a", 1]']
    found = [parse(f"FROM base\n{line}").stages[0].instructions[0].exec_form() for line in lines]
    assert found == [("a", "b c"), None, None, None]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60), max_size=12))
def test_any_text_is_parsed_or_refused_with_one_of_its_lines(lines: list[str]) -> None:
    text = "\n".join(lines)
    try:
        parse(text)
    except DockerfileError as error:
        assert 1 <= error.line <= text.replace("\r\n", "\n").count("\n") + 1


WORDS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=6), min_size=1, max_size=8), st.data())
def test_breaking_lines_anywhere_between_words_changes_nothing(commands: list[list[str]], data: st.DataObject) -> None:
    plain, broken = "FROM base\n", "FROM base\n"
    for words in commands:
        plain += "RUN " + " ".join(words) + "\n"
        broken += "RUN " + words[0]
        for word in words[1:]:
            broken += data.draw(st.sampled_from([" ", " \\\n", " \\ \n# comment\n", " \\\n\n"])) + word
        broken += "\n"
    assert [i[2].split() for i in names(broken)] == [i[2].split() for i in names(plain)] == commands


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), max_size=20), min_size=1, max_size=5)
)
def test_the_exec_form_gives_back_any_words(words: list[str]) -> None:
    assert parse("FROM base\nRUN " + json.dumps(words)).stages[0].instructions[0].exec_form() == tuple(words)
