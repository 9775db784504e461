"""nft rulesets as text: applied whole or not at all, listed as JSON."""

import json
from typing import Any

import structlog

from innkeeper.host.linux import netns

log = structlog.stdlib.get_logger(__name__)


async def apply(text: str, *, inside: str | None = None) -> None:
    """Apply a ruleset text as one transaction in the namespace `inside` (None: ours). Raises CommandFailed."""
    log.debug("nft -f -", inside=inside, text=text)
    await netns.run_inside(inside, ["nft", "-f", "-"], stdin=text.encode())


async def list_ruleset(*, inside: str | None = None) -> list[dict[str, Any]]:
    """All tables, chains, sets, maps and rules, each a one-key object `{"chain": {...}}`. Raises CommandFailed."""
    completed = await netns.run_inside(inside, ["nft", "--json", "list", "ruleset"])
    objects: list[dict[str, Any]] = json.loads(completed.stdout)["nftables"]
    return objects


async def set_elements(family: str, table: str, name: str, *, inside: str | None = None) -> list[Any]:
    """The elements of a set; empty when there is no such set."""
    argv = ["nft", "--json", "list", "set", family, table, name]
    completed = await netns.run_inside(inside, argv, check=False)
    if completed.returncode != 0:
        return []
    for entry in json.loads(completed.stdout)["nftables"]:
        if "set" in entry:
            elements: list[Any] = entry["set"].get("elem", [])
            return elements
    return []


async def counters(family: str, table: str, *, inside: str | None = None) -> dict[str, int]:
    """The packets of each named counter of a table; empty when there is no such table."""
    argv = ["nft", "--json", "list", "counters", "table", family, table]
    completed = await netns.run_inside(inside, argv, check=False)
    if completed.returncode != 0:
        return {}
    found = (entry["counter"] for entry in json.loads(completed.stdout)["nftables"] if "counter" in entry)
    return {str(one["name"]): int(one["packets"]) for one in found}


async def delete_table(family: str, table: str, *, inside: str | None = None) -> None:
    """Remove a table with everything in it; harmless when it is not there."""
    # Adding it first makes the deletion succeed either way, in the same transaction.
    await apply(f"table {family} {table}\ndelete table {family} {table}\n", inside=inside)
