"""What the command line prints: text of guests and users with its control characters made visible, tables, JSON, failures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn
from unicodedata import category

FAILED = 1
USAGE = 2
UNREACHABLE = 69  # EX_UNAVAILABLE of sysexits.h

# What a line of a command's output may hold besides text: line ends, tabs, and the joiners of words and emoji.
_OF_OUTPUT = frozenset("\t\n\r\u200c\u200d")
# C0, DEL and C1 move the cursor or talk to the terminal; separators, bidirectional controls and invisible characters (Cf: soft hyphens, zero-width spaces,
# tags) make text look like other text; surrogates cannot be encoded. Spaces of all widths, icons of private use and letters newer than this Python's tables
# are text in an output, and no part of a name that one should take for what it looks like.
_CONTROLS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def _escape(character: str) -> str:
    code = ord(character)
    named = {0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r"}.get(code)
    return named or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


def visible(value: object) -> str:
    """One line of harmless text: whatever is not printable (control characters, newlines, direction marks, invisible characters) as backslash escapes."""
    text = value if isinstance(value, str) else str(value)
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def visible_lines(text: str) -> str:
    """A command's output, harmless: newlines, tabs and carriage returns stay, other control and invisible characters become backslash escapes."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in _OF_OUTPUT or category(character) not in _CONTROLS
        else _escape(character)
        for character in text
    )


def say(value: object) -> None:
    """A harmless line on stdout."""
    print(visible(value))


def note(value: object) -> None:
    """A harmless line on stderr."""
    print(visible(value), file=sys.stderr, flush=True)


def fail(message: object, *, status: int = FAILED) -> NoReturn:
    """End the command with a message on stderr."""
    note(f"inn: {message}")
    raise SystemExit(status)


def print_json(value: Any) -> None:
    """JSON on stdout; ASCII only, so that no character of a guest reaches the terminal as itself (a lone DEL is none of JSON's escapes)."""
    print(json.dumps(value, indent=2, ensure_ascii=True).replace("\x7f", "\\u007f"))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "none") -> None:
    """A table on stdout: drawn by rich on a terminal, tab-separated with a heading elsewhere."""
    cells = [["-" if cell is None else visible(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in [list(columns), *cells]:
            print("\t".join(line))
        return
    if not cells:
        print(empty)
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in cells:
        # Text, not str: square brackets of a guest are no markup.
        table.add_row(*(Text(cell) for cell in line))
    Console().print(table)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """One `name: value` line each, aligned."""
    pairs = [(name, "-" if value is None else visible(value)) for name, value in fields]
    width = max((len(name) for name, _ in pairs), default=0) + 1
    for name, value in pairs:
        print(f"{name + ':':<{width}} {value}")


def human_size(size: int) -> str:
    """Bytes as a person reads them: `12.2 kB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
