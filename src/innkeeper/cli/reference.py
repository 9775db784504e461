"""The generated parts of docs/cli.md and docs/operations.md: `python -m innkeeper.cli.reference docs` writes them anew.

They are made from the commands' own help and from Settings, and a test compares them, so the pages cannot differ from the program.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from innkeeper.cli.main import build
from innkeeper.settings import Settings
from innkeeper.settings_sources import ENV_PREFIX, allowed_values

WIDTH = 100
PAGES = {"cli.md": "commands", "operations.md": "settings"}
# Defaults that depend on the machine that asks.
MACHINE_DEFAULTS = {"max_starts": "one per CPU, at least 2"}


def commands_markdown() -> str:
    """A section for each command with its help as it prints it."""
    return "\n\n".join(_sections(typer.main.get_command(build()), "inn", None))


def _sections(command: Any, name: str, parent: Any) -> Iterator[str]:
    context = typer.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH)
    path = context.command_path
    # `{NAME}` is how the library marks a required argument; people read braces as a choice.
    text = re.sub(r"\{([A-Z]+)\}", r"\1", command.get_help(context)).rstrip()
    yield f"## {path}\n\n```text\n{text}\n```"
    for child in getattr(command, "commands", {}).values():
        if not child.hidden:
            yield from _sections(child, child.name, context)


def settings_markdown() -> str:
    """A table row for each setting."""
    rows = [
        f"| `{ENV_PREFIX}{name.upper()}` | {_default(name, field)} | {allowed_values(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | values | meaning |", "| --- | --- | --- | --- |", *rows])


def _default(name: str, field: FieldInfo) -> str:
    if name in MACHINE_DEFAULTS:
        return MACHINE_DEFAULTS[name]
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None or value == "":
        return "-"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def generated(part: str) -> str:
    """A generated part, `commands` or `settings`."""
    return commands_markdown() if part == "commands" else settings_markdown()


def with_generated(text: str, part: str) -> str:
    """A page with its generated part replaced. Raises ValueError where the page has no place for it."""
    begin, end = f"<!-- generated: {part} -->\n", f"<!-- end of {part} -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"the page has no '{begin.strip()}' and '{end}'")
    return f"{before}{begin}{generated(part)}\n{end}{after}"


if __name__ == "__main__":
    for page_name, part_name in PAGES.items():
        page = Path(sys.argv[1]) / page_name
        page.write_text(with_generated(page.read_text(), part_name))
