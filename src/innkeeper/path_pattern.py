"""Patterns of paths as build files write them: `*`, `?`, `[a-z]`, none of which matches a slash."""

from __future__ import annotations

import re


class PatternError(ValueError):
    """A pattern that cannot be read; the message says which."""


def wildcard(source: str) -> re.Pattern[str]:
    """The pattern of a path with `*`, `?`, `[a-z]`, `[^a-z]` and `\\x`, none of which matches a slash. Raises PatternError."""
    out, at = "", 0
    while at < len(source):
        char = source[at]
        at += 1
        if char == "*":
            out += "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "\\" and at < len(source):
            out += re.escape(source[at])
            at += 1
        elif char == "[":
            end = source.find("]", at + (2 if source[at : at + 1] == "^" else 1))
            if end < 0:
                raise PatternError(f"{source}: a [ is not closed")
            body = source[at:end]
            negated = body.startswith("^")
            ranges = "".join("-" if c == "-" else re.escape(c) for c in body.removeprefix("^"))
            out += f"(?!/)[{'^' if negated else ''}{ranges}]"
            at = end + 1
        else:
            out += re.escape(char)
    try:
        return re.compile(out, re.DOTALL)
    except re.error:
        raise PatternError(f"{source}: not a pattern") from None
