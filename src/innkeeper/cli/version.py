"""`inn version`: which Innkeeper this is."""

from __future__ import annotations

from innkeeper.cli.options import Json
from innkeeper.cli.printing import print_json, say


def version(json: Json = False) -> None:
    """Print the version of this command."""
    from importlib.metadata import version as installed

    number = installed("innkeeper")
    if json:
        print_json({"version": number})
    else:
        say(f"innkeeper {number}")
