"""The terminal filter: what a guest prints, on the user's terminal, without letting the guest talk to that terminal."""

from __future__ import annotations

import re

from innkeeper.cli.printing import visible_lines

# Colours and styles are harmless; everything else after ESC moves the cursor, sets titles, writes the clipboard or asks for answers.
_SGR = re.compile(r"\x1b\[[0-9;:]{0,64}m")
_PARTIAL_SGR = re.compile(r"\x1b(\[[0-9;:]{0,64})?\Z")
RESET = "\x1b[0m"


class TerminalFilter:
    """Feed it text in pieces: newlines, tabs, carriage returns and colours pass, other control characters become visible."""

    def __init__(self) -> None:
        self._held = ""
        self._coloured = False

    def feed(self, text: str) -> str:
        """The harmless form of a piece; the beginning of a sequence that may be a colour is held until the next."""
        text = self._held + text
        partial = _PARTIAL_SGR.search(text)
        self._held = partial[0] if partial else ""
        if partial:
            text = text[: partial.start()]
        parts = []
        position = 0
        for found in _SGR.finditer(text):
            parts += [visible_lines(text[position : found.start()]), found[0]]
            self._coloured = True
            position = found.end()
        parts.append(visible_lines(text[position:]))
        return "".join(parts)

    def end(self) -> str:
        """What was held, and the colours taken back."""
        held, self._held = self._held, ""
        return visible_lines(held) + (RESET if self._coloured else "")
