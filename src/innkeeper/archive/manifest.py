"""What a backup holds, as it says itself: a list of its members, and what kind of server it is of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from innkeeper.archive.members import ArchiveError, Entry

# Of the whole archive. Raised when an older server could not restore what a newer one wrote.
FORMAT = 3
MANIFEST = "manifest.json"
HOST_MANIFEST = "host/manifest.json"
# Facts of the host's: names of members whose files bear the mark of `host.linux.guest_written`, and of volumes that nobody may ever write.
GUEST_WRITTEN, IMMUTABLE = "guest_written", "immutable"
MANIFEST_MAX_BYTES = 1 << 30


def manifest_bytes(facts: Mapping[str, Any], entries: Iterable[Entry]) -> bytes:
    """The JSON of a manifest: `{"format", ...facts, "files": [Entry]}`."""
    return json.dumps({"format": FORMAT, **facts, "files": [asdict(entry) for entry in entries]}).encode() + b"\n"


def parse_manifest(content: bytes) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The facts, and the entries by name. Raises ArchiveError."""
    try:
        facts = json.loads(content)
        if facts["format"] > FORMAT:
            raise ArchiveError("the backup was made by a newer version of the server")
        entries = {row["name"]: Entry(**row) for row in facts.pop("files")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArchiveError("the manifest is damaged") from error
    return facts, entries


def check(found: Mapping[str, Entry], expected: Mapping[str, Entry]) -> None:
    """Raises ArchiveError, naming a file, unless the members that were read are the ones that the manifest lists."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise ArchiveError(f"{name} is missing")
        if name not in expected:
            raise ArchiveError(f"{name} is not in the manifest")
        if found[name] != expected[name]:
            raise ArchiveError(f"{name} is not what it was when it was backed up")
