"""The network's tools, tried in a network namespace of their own that goes away with the process."""

from __future__ import annotations

from pathlib import Path

from innkeeper.host.linux import command
from innkeeper.host.probes.check import Check, Findings
from innkeeper.host.probes.machine import KERNEL_FIX, find_tool

NFT_RULES = b"""
table inet innkeeper_probe {
  set allowed { type ipv4_addr . ipv4_addr; flags timeout; }
  chain forward {
    type filter hook forward priority 0; policy drop;
    ip saddr . ip daddr @allowed accept
  }
}
table ip innkeeper_probe_nat {
  chain post {
    type nat hook postrouting priority 100;
    masquerade
  }
}
"""
# What is left out of small kernels: without it closed connections fill the host's table of them.
NFT_TIMEOUTS = b"""
table ip innkeeper_probe {
  ct timeout guest { protocol tcp; l3proto ip; policy = { established: 7440, close: 5 }; }
  chain forward {
    type filter hook forward priority 0; policy accept;
    meta l4proto tcp ct timeout set "guest"
  }
}
"""
LINKS = b"link add probe0 type veth peer name probe1\naddress add 192.0.2.1/31 dev probe0\nlink set probe0 up\n"


async def probe_network() -> Findings:
    """nft with the features that the firewall uses, and iproute2 with veth pairs."""
    return Findings((await _check_nft(), await _check_iproute()))


async def _check_nft() -> Check:
    install = "apt-get install -y nftables"
    if find_tool("nft") is None:
        return Check("nft", False, "nft is not installed", install, required=True)
    try:
        await command.run(["unshare", "--net", "nft", "-f", "-"], stdin=NFT_RULES, timeout_seconds=10)
    except command.CommandFailed as error:
        detail = f"nft cannot load a ruleset: {first_line(error)}"
        return Check("nft", False, detail, "modprobe -a nf_tables nft_masq nf_nat nf_conntrack", required=True)
    try:
        await command.run(["unshare", "--net", "nft", "-f", "-"], stdin=NFT_TIMEOUTS, timeout_seconds=10)
    except command.CommandFailed as error:
        detail = f"the kernel lacks CONFIG_NF_CONNTRACK_TIMEOUT (ct timeout): {first_line(error)}"
        return Check("nft", False, detail, KERNEL_FIX, required=True)
    return Check("nft", True, "sets, connection timeouts and masquerade work", required=True)


async def _check_iproute() -> Check:
    install = "apt-get install -y iproute2"
    if find_tool("ip") is None:
        return Check("iproute2", False, "ip is not installed", install, required=True)
    try:
        await command.run(["unshare", "--net", "ip", "-batch", "-"], stdin=LINKS, timeout_seconds=10)
    except command.CommandFailed as error:
        return Check("iproute2", False, f"no veth pair: {first_line(error)}", "modprobe veth", required=True)
    return Check("iproute2", True, "namespaces and veth pairs work", required=True)


def first_line(error: command.CommandFailed) -> str:
    """What a failed command said first, or how it ended."""
    return next(iter(error.stderr_tail.splitlines()), error.reason)


def check_ip_forward() -> Check:
    """The host passes guests' packets on only while this is on."""
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1":
        return Check("ip_forward", True, "on")
    return Check("ip_forward", None, "off: the server switches it on when it starts", "sysctl -w net.ipv4.ip_forward=1")
