"""Words and variables of a Dockerfile: quotes, escapes, `$X`, `${X}`, `${X:-default}`, `${X:+other}`. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DEPTH_MAX = 20
# `${A:-$A$A}` may double at every level: what one word can grow to is bounded.
EXPANDED_MAX = 262_144


class WordError(ValueError):
    """A word that cannot be read; the message says why."""


def split_words(text: str, escape: str) -> list[str]:
    """The words of a text, cut at blanks outside of quotes; quotes and escapes are still in them. Raises WordError."""
    words: list[str] = []
    word, quote, at = "", "", 0
    while at < len(text):
        char = text[at]
        if char == escape and quote != "'" and at + 1 < len(text):
            word += text[at : at + 2]
            at += 2
            continue
        if quote:
            quote = "" if char == quote else quote
            word += char
        elif char in "\"'":
            quote = char
            word += char
        elif char in " \t":
            if word:
                words.append(word)
            word = ""
        else:
            word += char
        at += 1
    if quote:
        raise WordError(f"a quote {quote} is not closed")
    return [*words, word] if word else words


def expand(text: str, variables: Mapping[str, str], escape: str, *, quotes: bool = True) -> str:
    """The text with its variables replaced and, with `quotes`, its quotes and escapes taken away. An unknown variable is empty. Raises WordError."""
    return _Expansion(text, variables, escape, quotes).run()


class _Expansion:
    def __init__(self, text: str, variables: Mapping[str, str], escape: str, quotes: bool, depth: int = 0) -> None:
        if depth > _DEPTH_MAX:
            raise WordError("variables are nested too deeply")
        self._text = text
        self._variables = variables
        self._escape = escape
        self._quotes = quotes
        self._depth = depth
        self._at = 0

    def run(self) -> str:
        out: list[str] = []
        size = 0
        quote = ""
        while self._at < len(self._text):
            char = self._text[self._at]
            if self._quotes and quote == "'":
                piece = "" if char == "'" else char
                quote = "" if char == "'" else quote
                self._at += 1
            elif self._quotes and char in "\"'" and (not quote or char == quote):
                quote = "" if quote else char
                piece = ""
                self._at += 1
            elif char == self._escape:
                piece = self._escaped(quote)
            elif char == "$":
                piece = self._variable()
            else:
                piece = char
                self._at += 1
            size += len(piece)
            if size > EXPANDED_MAX:
                raise WordError(f"a word grows beyond {EXPANDED_MAX} characters")
            out.append(piece)
        if quote:
            raise WordError(f"a quote {quote} is not closed")
        return "".join(out)

    def _escaped(self, quote: str) -> str:
        following = self._text[self._at + 1 : self._at + 2]
        self._at += 1 + len(following)
        if not self._quotes:
            # In a here-document only a variable can be escaped.
            return following if following in ("$", self._escape) and following else self._escape + following
        if quote == '"' and following not in ('"', "$", self._escape):
            return self._escape + following
        return following

    def _variable(self) -> str:
        rest = self._text[self._at + 1 :]
        if rest.startswith("{"):
            return self._braced()
        found = NAME.match(rest)
        if found is None:
            self._at += 1
            return "$"
        self._at += 1 + found.end()
        return self._variables.get(found[0], "")

    def _braced(self) -> str:
        start = self._at + 2
        end = self._closing(start)
        body = self._text[start:end]
        self._at = end + 1
        found = NAME.match(body)
        if found is None:
            raise WordError(f"${{{body[:40]}}}: not a variable")
        name, rest = found[0], body[found.end() :]
        value = self._variables.get(name)
        if not rest:
            return value or ""
        strict = rest[0] == ":"
        operator = rest[1:2] if strict else rest[0]
        if operator not in ("-", "+"):
            raise WordError(f"${{{body[:40]}}}: only :- and :+ are supported")
        there = bool(value) if strict else value is not None
        word = rest[2:] if strict else rest[1:]
        if operator == "-" and there:
            return value or ""
        if operator == "+" and not there:
            return ""
        return _Expansion(word, self._variables, self._escape, self._quotes, self._depth + 1).run()

    def _closing(self, at: int) -> int:
        depth = 1
        while at < len(self._text):
            char = self._text[at]
            if char == self._escape:
                at += 2
                continue
            if char == "$" and self._text[at + 1 : at + 2] == "{":
                depth += 1
                at += 1
            elif char == "}":
                depth -= 1
                if depth == 0:
                    return at
            at += 1
        raise WordError("${ is not closed")


def key_values(text: str, escape: str, variables: Mapping[str, str]) -> list[tuple[str, str]]:
    """The pairs of `ENV` and `LABEL`: `a=b "c d"=e`, or the old `a rest of the line`. Raises WordError."""
    words = split_words(text, escape)
    first = words[0]
    if "=" not in first:
        rest = text.strip()[len(first) :].strip()
        if not rest:
            raise WordError(f"{first}: wants a value")
        return [(expand(first, variables, escape), expand(rest, variables, escape))]
    pairs = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise WordError(f"{word}: wants NAME=value")
        name = expand(name, variables, escape)
        if not name:
            raise WordError(f"{word}: wants NAME=value")
        pairs.append((name, expand(value, variables, escape)))
    return pairs
