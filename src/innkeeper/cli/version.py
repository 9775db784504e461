"""`inn version`: which Innkeeper this is."""

from __future__ import annotations

from innkeeper import __version__
from innkeeper.cli.options import Json
from innkeeper.cli.printing import print_json, say


def version(json: Json = False) -> None:
    """Print the version of this command."""
    if json:
        print_json({"version": __version__})
    else:
        say(f"innkeeper {__version__}")
