from ipaddress import IPv4Network

from innkeeper.host.network import firewall
from innkeeper.host.network.addressing import NOT_PUBLIC, ServerPlan
from innkeeper.host.network.firewall import FirewallLimits, PolicyClass
from innkeeper.host.network.forward_policy import blocking_chains

PLAN = ServerPlan("deadbeef", IPv4Network("100.64.16.0/20"))


def test_every_chain_on_a_hook_of_the_router_drops_by_default() -> None:
    text = firewall.router_ruleset(PLAN, FirewallLimits())
    hooks = [line for line in text.splitlines() if " hook " in line]
    assert len(hooks) == 6
    assert all("policy drop" in line for line in hooks)
    assert all(str(network) in text for network in NOT_PUBLIC)


def test_rules_are_replaced_in_one_transaction() -> None:
    for text in (firewall.router_ruleset(PLAN, FirewallLimits()), firewall.host_ruleset(PLAN, FirewallLimits())):
        words = [line for line in text.splitlines() if line.startswith(("table", "delete"))]
        assert [line for line in words if line.startswith("delete")]
        assert words[0].startswith("table") and words[1] == f"delete {words[0]}"


def test_the_own_subnet_stays_closed_whatever_is_allowed() -> None:
    text = firewall.router_ruleset(PLAN, FirewallLimits(allowed_cidrs=(IPv4Network("100.64.0.0/10"),)))
    internet = text[text.index("chain internet") :]
    assert internet.index(f"ip daddr {PLAN.subnet} goto refuse") < internet.index("ip daddr @allowed")
    assert internet.index("dport { 53, 853 }") < internet.index("ip daddr @allowed")


def test_the_host_opens_by_exact_address_only() -> None:
    limits = FirewallLimits(allowed_cidrs=(IPv4Network("10.0.0.0/8"), IPv4Network("10.1.2.3/32")))
    exceptions = next(line for line in firewall.host_ruleset(PLAN, limits).splitlines() if "set exceptions" in line)
    assert "10.1.2.3/32" in exceptions
    assert "10.0.0.0/8" not in exceptions


def test_mail_is_a_choice() -> None:
    assert "tcp dport 25 goto refuse" in firewall.router_ruleset(PLAN, FirewallLimits())
    assert "dport 25 " not in firewall.router_ruleset(PLAN, FirewallLimits(allow_smtp=True))


def test_changes_are_elements_only() -> None:
    slots = [PLAN.slot(0), PLAN.slot(1)]
    texts = [
        firewall.add_slots(slots, online=slots[:1]),
        firewall.remove_slots(slots),
        firewall.set_policy(slots[0], PolicyClass.INTERNET),
        firewall.set_policy(slots[0], PolicyClass.NONE),
    ]
    lines = "".join(texts).splitlines()
    assert lines
    assert all(line.startswith(("add element ", "delete element ")) for line in lines)
    assert '"s0" . 02:de:ad:00:00:00 . 100.64.16.10' in texts[0]


def test_chains_of_others_that_drop_forwarded_packets() -> None:
    def chain(**values: str) -> dict[str, dict[str, str]]:
        plain = {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": "drop"}
        return {"chain": plain | values}

    assert blocking_chains([chain()]) == ["the nft chain 'ip filter FORWARD' drops forwarded packets by policy"]
    harmless = [chain(policy="accept"), chain(hook="input"), chain(family="ip6"), chain(table="innkeeper_deadbeef")]
    assert blocking_chains(harmless) == []
    assert "firewalld" in blocking_chains([{"table": {"family": "inet", "name": "firewalld"}}])[0]
