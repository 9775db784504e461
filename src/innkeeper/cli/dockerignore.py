"""`.dockerignore`: what of a directory does not travel to the server."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass

from innkeeper.path_pattern import wildcard


@dataclass(frozen=True, slots=True)
class IgnoreRule:
    """One line of .dockerignore; `again` (`!`) takes back what an earlier line left out."""

    pattern: re.Pattern[str]
    again: bool


def ignore_rules(text: str) -> list[IgnoreRule]:
    """The rules of a .dockerignore file. Raises PatternError for a bad pattern."""
    rules = []
    for line in text.removeprefix("\ufeff").splitlines():
        stripped = line.strip()
        if not stripped or line.startswith("#"):
            continue
        again = stripped.startswith("!")
        path = posixpath.normpath(stripped.removeprefix("!").strip().lstrip("/") or ".")
        if path == ".":
            continue
        parts = [".*" if part == "**" else wildcard(part).pattern for part in path.split("/")]
        joined = "/".join(parts).replace(".*/", "(?:.*/)?")
        # What is below a directory goes with it.
        rules.append(IgnoreRule(re.compile(f"{joined}(?:/.*)?", re.DOTALL), again))
    return rules


def is_ignored(path: str, rules: Iterable[IgnoreRule]) -> bool:
    """Whether the rules leave a path out; the last one that matches counts."""
    ignored = False
    for rule in rules:
        if rule.pattern.fullmatch(path):
            ignored = not rule.again
    return ignored
