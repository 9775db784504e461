"""Whether somebody else's firewall on this host would keep guests from the network."""

from collections.abc import Sequence
from typing import Any

from innkeeper.host.linux import command, nftables

_OURS = "innkeeper_"


def blocking_chains(objects: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each chain of others that drops forwarded packets, from `nft --json list ruleset` objects."""
    blockers = []
    for entry in objects:
        chain = entry.get("chain", {})
        if chain.get("hook") != "forward" or chain.get("family") not in ("ip", "inet"):
            continue
        if chain["table"].startswith(_OURS) or chain.get("policy") != "drop":
            continue
        where = f"{chain['family']} {chain['table']} {chain['name']}"
        blockers.append(f"the nft chain '{where}' drops forwarded packets by policy")
    for entry in objects:
        table = entry.get("table", {})
        if table.get("name") == "firewalld" and table.get("family") == "inet":
            blockers.append("firewalld refuses forwarded packets that none of its zones allows")
    return blockers


async def forward_blockers(*, inside: str | None = None) -> list[str]:
    """A sentence for each firewall of others (Docker, ufw, firewalld) that would drop guests' packets.

    Empty when there is none. Raises CommandFailed when nft itself does not work.
    """
    blockers = blocking_chains(await nftables.list_ruleset(inside=inside))
    # Rules of the older iptables do not show in nft.
    try:
        legacy = await command.run(["iptables-legacy", "-S", "FORWARD"], check=False)
    except command.CommandFailed:
        return blockers
    if inside is None and b"-P FORWARD DROP" in legacy.stdout:
        blockers.append("the iptables-legacy chain 'filter FORWARD' drops forwarded packets by policy")
    return blockers
