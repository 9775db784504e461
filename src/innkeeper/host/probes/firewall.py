"""Firewalls of others on this host that would drop guests' packets, each with the rule that lets ours through."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network
from typing import Any

from innkeeper.host.linux import command, nftables
from innkeeper.host.network.addressing import ServerPlan
from innkeeper.host.network.forward_policy import blocking_chains
from innkeeper.host.probes.check import Check
from innkeeper.host.probes.network import first_line
from innkeeper.settings import Settings

NAME = "forwarding"


async def check_forwarding(settings: Settings) -> Check:
    """Docker, ufw and firewalld drop forwarded packets by policy. Guests start all the same, but reach nothing: a warning."""
    # Only the interface's name is wanted, and it does not depend on the subnet.
    uplink = ServerPlan(settings.server_id, IPv4Network("100.64.0.0/20")).uplink
    try:
        objects = await nftables.list_ruleset(inside=settings.host_netns or None)
        legacy = await _legacy_rules()
        firewalld_lets_pass = await _trusted_by_firewalld(uplink)
    except command.CommandFailed as error:
        return Check(NAME, None, f"the host's rules cannot be read: {first_line(error)}", "apt-get install -y nftables")
    problems = [
        *dropping_chains(objects, uplink),
        *dropping_legacy(legacy, uplink),
        *dropping_firewalld(objects, uplink, trusted=firewalld_lets_pass),
    ]
    if not problems:
        return Check(NAME, True, "no firewall of others drops guests' packets")
    return Check(NAME, False, "; ".join(what for what, _ in problems), " && ".join(fix for _, fix in problems))


def dropping_chains(objects: Sequence[dict[str, Any]], uplink: str) -> list[tuple[str, str]]:
    """(what, fix) for each nft chain of others that drops by policy and does not accept what comes in from `uplink`."""
    accepting = {_chain_of(entry["rule"]) for entry in objects if "rule" in entry and _accepts(entry["rule"], uplink)}
    found = []
    for entry in objects:
        sentences = blocking_chains([entry]) if "chain" in entry else []
        if not sentences:
            continue
        chain = entry["chain"]
        where = (chain["family"], chain["table"], chain["name"])
        if where not in accepting:
            insert = f"nft insert rule {' '.join(where)}"
            fix = f"{insert} oifname {uplink} ct state established,related accept && {insert} iifname {uplink} accept"
            found.append((sentences[0], fix))
    return found


def _chain_of(rule: dict[str, Any]) -> tuple[str, str, str]:
    return rule["family"], rule["table"], rule["chain"]


def _accepts(rule: dict[str, Any], uplink: str) -> bool:
    expressions: list[dict[str, Any]] = rule.get("expr", [])
    named = any(
        one.get("match", {}).get("left") == {"meta": {"key": "iifname"}} and one["match"].get("right") == uplink
        for one in expressions
    )
    return named and any("accept" in one for one in expressions)


def dropping_legacy(rules: str, uplink: str) -> list[tuple[str, str]]:
    """The same for `iptables-legacy -S FORWARD`, whose rules nft does not show."""
    if "-P FORWARD DROP" not in rules or f"-i {uplink} -j ACCEPT" in rules:
        return []
    insert = "iptables-legacy -I FORWARD"
    fix = f"{insert} -o {uplink} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT && {insert} -i {uplink} -j ACCEPT"
    return [("the iptables-legacy chain 'filter FORWARD' drops forwarded packets by policy", fix)]


def dropping_firewalld(objects: Sequence[dict[str, Any]], uplink: str, *, trusted: bool) -> list[tuple[str, str]]:
    """The same for firewalld, which decides by zone."""
    sentences = blocking_chains([entry for entry in objects if "table" in entry])
    if trusted or not sentences:
        return []
    fix = f"firewall-cmd --permanent --zone=trusted --add-interface={uplink} && firewall-cmd --reload"
    return [(sentence, fix) for sentence in sentences]


async def _legacy_rules() -> str:
    try:
        return (await command.run(["iptables-legacy", "-S", "FORWARD"], check=False)).stdout.decode(errors="replace")
    except command.CommandFailed:
        return ""  # not installed


async def _trusted_by_firewalld(uplink: str) -> bool:
    try:
        answer = await command.run(["firewall-cmd", f"--get-zone-of-interface={uplink}"], check=False)
    except command.CommandFailed:
        return False
    return answer.stdout.strip() == b"trusted"
