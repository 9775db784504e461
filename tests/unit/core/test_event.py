from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import innkeeper
from innkeeper.core.event import CATALOG, FAILURES

CONTROL = Path(innkeeper.__file__).parent / "control"
KINDS = ("room", "vm")
ACTION = re.compile(r"[a-z_]+\.[a-z_]+")


def nodes() -> Iterator[ast.AST]:
    for path in CONTROL.rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text()))


def constants(*values: ast.AST | None) -> set[str]:
    return {value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)}


def written() -> set[str]:
    """Every action that `audit.event`, or a function that hands it on, is given as it stands, or as `{kind}.action`."""
    found = set()
    for node in nodes():
        if isinstance(node, ast.Call):
            # No other text of that form is an argument of anything here.
            given = constants(*node.args, *(keyword.value for keyword in node.keywords))
            found |= {text for text in given if ACTION.fullmatch(text)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event":
            for action in node.args[1:2]:
                if isinstance(action, ast.JoinedStr):
                    found |= {kind + end for kind in KINDS for end in constants(action.values[-1])}
    return found


def verbs() -> set[str]:
    """What is put behind `room.` or `vm.` as the argument `verb`."""
    found = set()
    for node in nodes():
        if isinstance(node, ast.Call):
            found |= constants(*(keyword.value for keyword in node.keywords if keyword.arg == "verb"))
            if isinstance(node.func, ast.Name) and node.func.id == "_store_change":
                found |= constants(*node.args)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            found |= constants(*(default for argument, default in arguments if argument.arg == "verb"))
    return found


def test_the_catalog_has_every_action_that_is_written_and_no_other() -> None:
    listed = {action for actions in CATALOG.values() for action in actions}
    assert written() - listed == set()
    assert {verb for verb in verbs() if not any(f"{kind}.{verb}" in listed for kind in KINDS)} == set()
    made = written() | {f"{kind}.{verb}" for kind in KINDS for verb in verbs()}
    assert listed - made == set()
    assert listed >= FAILURES
    for group, actions in CATALOG.items():
        assert all(action.startswith(f"{group}.") for action in actions)
