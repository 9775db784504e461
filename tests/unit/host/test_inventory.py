import json

import pytest

from innkeeper.errors import UnavailableError
from innkeeper.host import inventory
from innkeeper.host.inventory import Inventory, PlatformChoice, choose_platform, refuse_reasons, take_inventory
from innkeeper.host.probes import machine, sandbox
from innkeeper.host.probes.check import Check, Findings, findings_from_dict
from innkeeper.host.probes.firewall import dropping_chains, dropping_firewalld, dropping_legacy
from innkeeper.settings import Settings

pytestmark = pytest.mark.anyio

GOOD = Check("sandbox", True, "runs", required=True)
BAD = Check("sandbox", False, "no sandbox starts", "apt-get install -y runsc", required=True)


@pytest.mark.parametrize(
    ("ok", "required", "word"),
    [(True, True, "ok"), (None, True, "warn"), (False, True, "FAIL"), (False, False, "warn"), (None, False, "warn")],
)
def test_words(ok, required, word):
    assert Check("x", ok, "d", required=required).word == word


def test_only_required_failures_refuse_and_in_doctors_words():
    found = Inventory(
        (GOOD, Check("kvm", False, "none"), BAD, Check("user", False, "no user", "useradd x", required=True)), {}
    )
    assert not found.ok
    assert refuse_reasons(found) == [
        "sandbox: no sandbox starts\n  FIX: apt-get install -y runsc",
        "user: no user\n  FIX: useradd x",
    ]
    assert refuse_reasons(Inventory((GOOD,), {})) == []


def test_findings_survive_json():
    findings = Findings((GOOD, BAD), {"exec_us": {"systrap": 1}})
    assert findings_from_dict(json.loads(json.dumps(findings.as_dict()))) == findings
    assert not findings.good and Findings((GOOD, Check("x", None, "y")), {}).good


# ------------------------------------------------------------------ what is remembered


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "host").mkdir()
    return Settings(home=tmp_path, runsc=str(tmp_path / "runsc"))


@pytest.fixture
def probes(monkeypatch, settings, tmp_path):
    """The long probes replaced by counters; returns {name: times run}."""
    (tmp_path / "runsc").write_text("#!/bin/sh\n")
    (tmp_path / "runsc").chmod(0o755)
    runs: dict[str, int] = {}

    def counting(name, findings):
        async def probe(_):
            runs[name] = runs.get(name, 0) + 1
            return findings[0]

        return probe

    answers = {name: [Findings((Check(name, True, "fine", required=True),), {name: 1})] for name in inventory.PROBES}
    answers["sandbox"] = [Findings((GOOD,), {"exec_us": {"systrap": 400, "ptrace": 300}})]
    monkeypatch.setattr(inventory, "PROBES", {name: counting(name, answers[name]) for name in answers})
    monkeypatch.setattr(inventory, "is_root", lambda: True)

    async def no_firewall(_):
        return Check("forwarding", True, "none")

    monkeypatch.setattr(inventory, "check_forwarding", no_firewall)
    return runs, answers


async def test_quick_runs_nothing_that_is_remembered(settings, probes):
    runs, _ = probes
    first = await take_inventory(settings)
    quick = await take_inventory(settings, quick=True)
    assert set(runs.values()) == {1} and len(runs) == len(inventory.PROBES)
    assert quick == first and quick.facts["platform"] == "ptrace"
    await take_inventory(settings)
    assert set(runs.values()) == {2}


async def test_failures_are_not_remembered(settings, probes):
    runs, answers = probes
    good = answers["sandbox"][0]
    answers["sandbox"][0] = Findings((BAD,))
    assert not (await take_inventory(settings, quick=True)).ok
    answers["sandbox"][0] = good
    await take_inventory(settings, quick=True)
    assert runs == {name: 2 if name == "sandbox" else 1 for name in inventory.PROBES}


async def test_a_good_verdict_that_turned_bad_is_forgotten(settings, probes):
    runs, answers = probes
    await take_inventory(settings)
    answers["sandbox"][0] = Findings((BAD,))
    await take_inventory(settings)
    await take_inventory(settings, quick=True)
    assert runs["sandbox"] == 3


async def test_another_runsc_or_a_damaged_file_is_another_host(settings, probes, tmp_path):
    runs, _ = probes
    await take_inventory(settings)
    (tmp_path / "runsc").write_text("#!/bin/sh\n# newer\n")
    await take_inventory(settings, quick=True)
    assert runs["sandbox"] == 2
    for damage in ("", "[]", '{"key": 1}', '{"key": {}, "probes": 3}'):
        (tmp_path / "host" / "inventory.json").write_text(damage)
        await take_inventory(settings, quick=True)
    assert runs["sandbox"] == 6


async def test_remembered_findings_of_the_right_key_and_wrong_shape_are_ignored(settings, probes, tmp_path):
    runs, _ = probes
    await take_inventory(settings)
    path = tmp_path / "host" / "inventory.json"
    stored = json.loads(path.read_text())
    stored["probes"]["sandbox"]["checks"][0]["surprise"] = 1
    path.write_text(json.dumps(stored))
    await take_inventory(settings, quick=True)
    assert runs["sandbox"] == 2


async def test_looking_leaves_no_state_directory_behind(tmp_path, probes):
    await take_inventory(Settings(home=tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()


async def test_without_root_the_probes_say_so_and_one_check_fails(settings, monkeypatch):
    monkeypatch.setattr(inventory, "is_root", lambda: False)
    monkeypatch.setattr(machine, "is_root", lambda: False)
    found = await take_inventory(settings)
    assert not found.ok
    assert any(check.name == "root" and check.fix and check.fix.startswith("sudo ") for check in found.checks)
    assert {check.name: check.detail for check in found.checks}["sandbox"] == "not tried: needs root"


# ------------------------------------------------------------------ the platform


@pytest.mark.parametrize(
    ("exec_us", "platform"),
    [
        ({"systrap": 400, "ptrace": 300}, "ptrace"),
        ({"systrap": 400, "ptrace": 380}, "systrap"),
        ({"systrap": 300, "ptrace": 400}, "systrap"),
        ({"ptrace": 300}, "ptrace"),
        ({}, None),
    ],
)
def test_the_clearly_faster_platform_wins(exec_us, platform):
    assert sandbox.faster(exec_us) == platform


async def test_the_operator_wins_without_a_measurement(settings, probes):
    chosen = Settings(home=settings.home, runsc_platform="systrap")
    assert await choose_platform(chosen) == PlatformChoice("systrap", "set by runsc_platform")
    assert probes[0] == {}


async def test_the_choice_is_measured_once_and_has_a_reason(settings, probes):
    first = await choose_platform(settings)
    assert first == await choose_platform(settings)
    assert first.platform == "ptrace" and "faster here" in first.reason
    assert probes[0] == {"sandbox": 1}


async def test_no_platform_is_an_error_with_the_fix(settings, probes):
    probes[1]["sandbox"][0] = Findings((BAD,))
    with pytest.raises(UnavailableError, match="FIX: apt-get install -y runsc"):
        await choose_platform(settings)


@pytest.mark.parametrize(
    ("text", "version", "release"),
    [
        ("runsc version 0.0~20240729.0\nspec: 1.0.2-dev\n", "0.0~20240729.0", 20240729),
        ("runsc version 0.0~20221219.0-2\n", "0.0~20221219.0-2", 20221219),
        ("runsc version release-20261101.0-3-gabc\n", "release-20261101.0-3-gabc", 20261101),
        ("runsc version VERSION_MISSING\n", "VERSION_MISSING", 0),
        ("", "unknown", 0),
    ],
)
def test_versions(text, version, release):
    assert sandbox.parse_version(text) == (version, release)


@pytest.mark.parametrize(
    ("answer", "ok"),
    [("runsc version 0.0~20221219.0", False), ("runsc version odd", None), ("runsc version release-20230102.0", True)],
)
async def test_the_age_of_runsc(tmp_path, answer, ok):
    runsc = tmp_path / "runsc"
    runsc.write_text(f"#!/bin/sh\necho '{answer}'\n")
    runsc.chmod(0o755)
    _, check = await sandbox.probe_runsc(str(runsc))
    assert check.ok is ok
    assert (check.fix is None) == (ok is True)


async def test_a_missing_and_a_broken_runsc(tmp_path):
    (tmp_path / "runsc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "runsc").chmod(0o755)
    for name in (str(tmp_path / "runsc"), str(tmp_path / "absent")):
        runsc, check = await sandbox.probe_runsc(name)
        assert runsc is None and check.blocks and check.fix and "runsc" in check.fix
        assert (await sandbox.probe_sandbox(name, "auto")).checks == (check,)


# ------------------------------------------------------------------ the machine


def test_capabilities_from_the_status_file():
    assert machine.check_capabilities("CapEff:\t000001ffffffffff\n").ok
    short = machine.check_capabilities("CapEff:\t00000000a80425fb\n")  # what containers usually keep
    assert short.blocks and "CAP_SYS_ADMIN" in short.detail and "CAP_NET_ADMIN" in short.detail


def test_users():
    missing = machine.check_user("no-such-user-here")
    assert (
        missing.blocks
        and missing.fix
        and missing.fix.startswith("useradd --system")
        and missing.fix.endswith("no-such-user-here")
    )
    assert machine.check_user("root").blocks
    assert machine.check_user("nobody").ok


def test_agent(tmp_path):
    agent = tmp_path / "inn-agent"
    missing = machine.check_agent(agent)
    assert missing.blocks and missing.fix and "go build" in missing.fix and str(agent) in missing.fix
    agent.write_bytes(b"x")
    agent.chmod(0o755)
    assert machine.check_agent(agent).ok


def test_disk_and_memory_against_the_reserves(tmp_path):
    assert machine.check_disk(Settings(home=tmp_path / "a" / "b", disk_reserve_mb=0)).ok
    full = machine.check_disk(Settings(home=tmp_path, disk_reserve_mb=1 << 40))
    assert full.blocks and full.fix
    assert machine.check_memory(Settings(memory_reserve_mb=0)).ok
    assert machine.check_memory(Settings(memory_reserve_mb=1 << 40)).blocks


# ------------------------------------------------------------------ firewalls of others

UPLINK = "ik00000000u"
DOCKER = {
    "chain": {
        "family": "ip",
        "table": "filter",
        "name": "FORWARD",
        "hook": "forward",
        "policy": "drop",
        "type": "filter",
        "prio": 0,
    }
}


def rule(*expressions, chain="FORWARD"):
    return {"rule": {"family": "ip", "table": "filter", "chain": chain, "handle": 1, "expr": list(expressions)}}


def match(key, value):
    return {"match": {"op": "==", "left": {"meta": {"key": key}}, "right": value}}


def test_a_dropping_chain_comes_with_the_rule_that_helps():
    ((what, fix),) = dropping_chains([DOCKER], UPLINK)
    assert "ip filter FORWARD" in what
    assert fix == (
        f"nft insert rule ip filter FORWARD oifname {UPLINK} ct state established,related accept"
        f" && nft insert rule ip filter FORWARD iifname {UPLINK} accept"
    )


def test_the_pasted_rule_is_recognized_and_others_are_not():
    assert dropping_chains([DOCKER, rule(match("iifname", UPLINK), {"accept": None})], UPLINK) == []
    assert dropping_chains([DOCKER, rule(match("iifname", UPLINK), {"drop": None})], UPLINK)
    assert dropping_chains([DOCKER, rule(match("iifname", "docker0"), {"accept": None})], UPLINK)
    assert dropping_chains([DOCKER, rule(match("oifname", UPLINK), {"accept": None})], UPLINK)
    assert dropping_chains([DOCKER, rule(match("iifname", UPLINK), {"accept": None}, chain="OTHER")], UPLINK)


def test_our_own_chain_and_an_accepting_one_are_no_problem():
    ours = {"chain": {**DOCKER["chain"], "table": "innkeeper_0a0a0a0a"}}
    accepting = {"chain": {**DOCKER["chain"], "policy": "accept"}}
    assert dropping_chains([ours, accepting], UPLINK) == []


def test_legacy_iptables_and_firewalld():
    ((_, fix),) = dropping_legacy("-P FORWARD DROP\n", UPLINK)
    assert f"-i {UPLINK} -j ACCEPT" in fix
    assert dropping_legacy(f"-P FORWARD DROP\n-A FORWARD -i {UPLINK} -j ACCEPT\n", UPLINK) == []
    assert dropping_legacy("-P FORWARD ACCEPT\n", UPLINK) == []
    table = {"table": {"family": "inet", "name": "firewalld", "handle": 1}}
    assert "--zone=trusted" in dropping_firewalld([table], UPLINK, trusted=False)[0][1]
    assert dropping_firewalld([table], UPLINK, trusted=True) == []
    assert dropping_firewalld([], UPLINK, trusted=False) == []
