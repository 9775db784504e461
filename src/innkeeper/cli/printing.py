"""What the command line prints: text of guests and users with its control characters made visible, tables, JSON, failures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

FAILED = 1
USAGE = 2
UNREACHABLE = 69  # EX_UNAVAILABLE of sysexits.h

# C0, DEL and C1 move the cursor or talk to the terminal; separators and bidirectional controls make text look like other text;
# surrogates cannot be encoded.
_HIDDEN = [
    *range(0x20),
    *range(0x7F, 0xA0),
    *(0x061C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]


def _escape(code: int) -> str:
    named = {0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r"}.get(code)
    return named or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


_TABLE = {code: _escape(code) for code in _HIDDEN}


def visible(value: object) -> str:
    """One line of harmless text: control characters, newlines and direction marks as backslash escapes."""
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "backslashreplace").decode().translate(_TABLE)


_LINES_TABLE = {code: escape for code, escape in _TABLE.items() if code not in (0x09, 0x0A, 0x0D)}


def visible_lines(text: str) -> str:
    """Like `visible`, but newlines, tabs and carriage returns stay."""
    return text.encode("utf-8", "backslashreplace").decode().translate(_LINES_TABLE)


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
