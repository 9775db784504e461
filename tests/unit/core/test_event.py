from __future__ import annotations

import ast
from pathlib import Path

import innkeeper
from innkeeper.core.event import CATALOG, FAILURES

CONTROL = Path(innkeeper.__file__).parent / "control"


def written() -> set[str]:
    """Every action that the use cases name: the second argument of `audit.event`, and what is passed on as `action`."""
    found = set()
    for path in CONTROL.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                named = [keyword.value for keyword in node.keywords if keyword.arg == "action"]
                if isinstance(node.func, ast.Attribute) and node.func.attr == "event" and len(node.args) > 1:
                    named.append(node.args[1])
                found |= {each.value for each in named if isinstance(each, ast.Constant)}
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                defaults = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                found |= {d.value for a, d in defaults if a.arg == "action" and isinstance(d, ast.Constant)}
    return found


def test_the_catalog_has_every_action_that_is_written_and_no_other() -> None:
    assert {action for actions in CATALOG.values() for action in actions} == written()
    assert written() >= FAILURES
    for group, actions in CATALOG.items():
        assert all(action.startswith(f"{group}.") for action in actions)
