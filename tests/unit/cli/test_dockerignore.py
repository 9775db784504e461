from __future__ import annotations

import pytest

from innkeeper.cli.dockerignore import ignore_rules, is_ignored
from innkeeper.path_pattern import PatternError


@pytest.mark.parametrize(
    ("rules", "ignored", "kept"),
    [
        ("*.log", ["a.log"], ["a.txt", "x/a.log"]),
        ("**/*.log", ["a.log", "x/a.log", "x/y/a.log"], ["a.logs"]),
        ("node_modules", ["node_modules", "node_modules/a/b"], ["x/node_modules", "node_modules2"]),
        ("**/node_modules", ["node_modules/a", "x/node_modules/a"], ["node_modulesx"]),
        ("/build/", ["build", "build/x"], ["x/build"]),
        ("# comment\n\n a ", ["a"], ["# comment"]),
        ("*\n!keep", ["a", "b/c"], ["keep", "keep/x"]),
        ("!a\na", ["a"], []),
        ("a/**/z", ["a/z", "a/b/c/z"], ["a/zz"]),
        ("a?c", ["abc"], ["a/c", "ac"]),
        (".", [], ["a"]),
    ],
)
def test_rules(rules: str, ignored: list[str], kept: list[str]) -> None:
    found = ignore_rules(rules)
    assert [path for path in ignored if not is_ignored(path, found)] == []
    assert [path for path in kept if is_ignored(path, found)] == []


def test_a_bad_pattern_is_refused() -> None:
    with pytest.raises(PatternError):
        ignore_rules("[a")
