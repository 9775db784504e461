import json

import pytest
from scripted_server import organization, profile, room, token


def test_profile_list_is_tab_separated_for_programs(inn, server):
    server.profiles = [profile("base"), profile("mine", egress_policy={"mode": "none"})]
    lines = inn("profile", "list").out.splitlines()
    assert lines[0].split("\t")[:2] == ["NAME", "IMAGE"]
    assert [line.split("\t")[0] for line in lines[1:]] == ["base", "mine"]
    assert lines[2].split("\t")[5] == "none"


def test_a_profile_is_found_by_name_and_by_id_in_any_case(inn, server):
    wanted = str(server.profiles[0].id)
    for given in ("base", wanted, wanted.upper()):
        assert json.loads(inn("profile", "show", given, "--json").out)["id"] == wanted
    ended = inn("profile", "show", "absent")
    assert (ended.status, ended.err) == (1, "inn: there is no profile 'absent': see inn profile list\n")


def test_profile_create_sends_every_field(inn, server, monkeypatch):
    monkeypatch.setenv("SECRET", "s3")
    ended = inn(
        "profile", "create", "new", "--image", "base", "--vcpu-count", "4", "--memory-mb", "512", "--disk-mb", "100", "--env", "A=b=c",
        "--env", "SECRET", "--user", "user", "--workdir", "/w", "--egress", "none", "--driver", "gvisor", "--min-isolation", "gvisor",
        "--warm-pool-size", "0", "--idle-seconds", "never", "--command-timeout-seconds", "5", "--public-files", "off",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert server.seen[-1].json == {
        "name": "new", "image": "base", "vcpu_count": 4, "memory_mb": 512, "disk_mb": 100, "env": {"A": "b=c", "SECRET": "s3"},
        "user": "user", "workdir": "/w", "egress_policy": {"mode": "none"}, "driver": "gvisor", "min_isolation": "gvisor",
        "warm_pool_size": 0, "idle_seconds": None, "command_timeout_seconds": 5, "public_files": "off",
    }  # fmt: skip


def test_profile_create_from_toml_with_options_on_top(inn, server, tmp_path):
    (tmp_path / "p.toml").write_text(
        'name = "t"\nimage = "base"\nidle_seconds = "never"\nmemory_mb = 1\n[env]\nA = "1"\n'
    )
    assert inn("profile", "create", "-f", str(tmp_path / "p.toml"), "--memory-mb", "256").status == 0
    assert server.seen[-1].json == {
        "name": "t",
        "image": "base",
        "idle_seconds": None,
        "memory_mb": 256,
        "env": {"A": "1"},
    }


@pytest.mark.parametrize(
    "argv",
    [
        ("create", "x"),
        ("create", "--image", "base"),
        ("update", "base"),
        ("update", "base", "--idle-seconds", "soon"),
        ("update", "base", "--env", "NOT_SET_ANYWHERE"),
        ("create", "-f", "/nonexistent"),
    ],
)
def test_incomplete_profiles_are_usage_errors(inn, server, argv):
    assert inn("profile", *argv).status == 2
    assert not [one for one in server.seen if one.method in ("POST", "PATCH")]


def test_profile_update_sends_only_what_was_given(inn, server):
    assert inn("profile", "update", "base", "--user", "", "--name", "b2").status == 0
    assert (server.seen[-1].method, server.seen[-1].json) == ("PATCH", {"user": None, "name": "b2"})


def test_profile_delete(inn, server):
    assert json.loads(inn("profile", "delete", "base", "--json").out)["deleted"] is True
    assert server.seen[-1].path == f"/api/profile/{server.profiles[0].id}"


def test_token_create_prints_the_token_alone(inn, server):
    ended = inn("token", "create", "ci", "--scope", "rooms", "--scope", "audit", "--dialect", "instavm", "--test")
    assert ended.out == "rk_live_" + "0" * 32 + "\n"
    assert server.seen[-1].json == {"name": "ci", "dialect": "instavm", "test": True, "scopes": ["rooms", "audit"]}


def test_token_create_for_another_organization(inn, server):
    assert inn("token", "create", "theirs", "--organization", "acme").status == 0
    assert server.seen[-1].json == {"name": "theirs", "dialect": "gentility", "test": False, "organization": "acme"}


def test_organization_create(inn, server):
    ended = inn("organization", "create", "acme", "--max-instances", "3")
    assert ended.status == 0, ended.err
    assert server.seen[-1].json == {"name": "acme", "max_instances": 3, "max_memory_mb": None}
    lines = dict(line.split(":", 1) for line in ended.out.splitlines())
    assert (lines["name"].strip(), lines["max_instances"].strip(), lines["max_memory_mb"].strip()) == (
        "acme",
        "3",
        "none",
    )
    made = json.loads(inn("organization", "create", "acme", "--max-memory-mb", "0", "--json").out)
    assert (made["max_instances"], made["max_memory_mb"]) == (None, 0)


def test_organization_list(inn, server):
    server.organizations = [organization("default"), organization("acme", max_instances=0, max_memory_mb=4096)]
    lines = [line.split("\t")[:3] for line in inn("organization", "list").out.splitlines()]
    assert lines == [
        ["NAME", "MAX INSTANCES", "MAX MEMORY MB"],
        ["default", "none", "none"],
        ["acme", "0", "4096"],
    ]
    assert [one["max_instances"] for one in json.loads(inn("organization", "list", "--json").out)] == [None, 0]


def test_organization_limit_sends_only_what_was_given(inn, server):
    for argv, body in (
        (("--max-instances", "5"), {"max_instances": 5}),
        (("--max-memory-mb", "none"), {"max_memory_mb": None}),
        (("--max-instances", "none", "--max-memory-mb", "1"), {"max_instances": None, "max_memory_mb": 1}),
    ):
        ended = inn("organization", "limit", "acme", *argv, "--json")
        assert ended.status == 0 and json.loads(ended.out)["name"] == "acme", ended.err
        seen = server.seen[-1]
        assert (seen.method, seen.path, seen.json) == ("PATCH", "/v1/organizations/acme", body)
    inn("organization", "limit", "../tokens", "--max-instances", "1")
    assert server.seen[-1].path == "/v1/organizations/%2E%2E%2Ftokens"


@pytest.mark.parametrize("argv", [(), ("--max-instances", "many"), ("--max-memory-mb", "-1"), ("--max-memory-mb", "²")])
def test_wrong_limits_are_usage_errors(inn, server, argv):
    assert inn("organization", "limit", "acme", *argv).status == 2
    assert server.seen == []


def test_token_revoke_by_name_prefix_and_id(inn, server):
    server.tokens = [
        token("a", prefix="rk_live_aaaaaaaa"),
        token("b", prefix="rk_live_bbbbbbbb"),
        token("old", revoked_at="2026-01-01T00:00:00Z"),
    ]
    for given in ("b", "rk_live_bbbbbbbb", "rk_live_bbbbbbbb...", str(server.tokens[1].id)):
        assert inn("token", "revoke", given).status == 0
        assert server.seen[-1].path == f"/v1/tokens/{server.tokens[1].id}"
    assert inn("token", "revoke", "old").status == 1


def test_token_revoke_refuses_to_guess(inn, server):
    server.tokens = [token("a"), token("a")]
    ended = inn("token", "revoke", "a")
    assert ended.status == 1 and "2 tokens" in ended.err
    assert all(one.method == "GET" for one in server.seen)


def test_token_list_makes_names_harmless(inn, server):
    server.tokens = [token("x\x1b[31m\ny\u202e")]
    out = inn("token", "list").out
    assert out.splitlines()[1].startswith("x\\x1b[31m\\ny\\u202e\t") and len(out.splitlines()) == 2


def test_room_list_and_show_with_boot_trace(inn, server):
    server.rooms = [room("one\ttwo", server.profiles[0]), room("other", profile("elsewhere"))]
    assert len(inn("room", "list").out.splitlines()) == 3
    assert len(json.loads(inn("room", "list", "--profile", "base", "--json").out)) == 1
    out = inn("room", "show", "base", "one\ttwo").out
    assert "one\\ttwo" in out and "gvisor (ptrace)" in out and "faster here" in out
    assert out.splitlines()[-1].split("\t") == ["ready", "3.5", "3.2"]
    assert inn("room", "show", "base", "other").status == 1


def test_room_create_and_rm(inn, server):
    assert "ready" in inn("room", "create", "base", "r").out
    assert server.seen[-1].body == b""
    assert inn("room", "create", "base", "r", "--host", "22222222-2222-4222-8222-222222222222").status == 0
    assert server.seen[-1].json == {"host_id": "22222222-2222-4222-8222-222222222222"}
    assert inn("room", "rm", "base", "r").out == "destroyed room r\n"


def test_image_host_audit(inn, server):
    assert "a\\x1b[2Jb" in inn("image", "list").out and "12.3 MB" in inn("image", "list").out
    assert "1024 of 8000" in inn("host", "list").out and "unreachable" in inn("host", "list").out
    told = inn("host", "status", "here").out
    assert "warm:" in told and "gvisor (gvisor, on ptrace); qemu cannot run: QEMU is not installed" in told
    assert inn("host", "status", "nowhere").status == 1
    assert "k=v" in inn("audit", "--limit", "1").out
    assert server.seen[-1].query["limit"] == ["1"]


def test_version(inn):
    from innkeeper import __version__

    assert inn("version").out == f"innkeeper {__version__}\n"
    assert json.loads(inn("version", "--json").out) == {"version": __version__}


def test_ssh_keys_are_added_listed_and_removed(inn, server, tmp_path):
    (tmp_path / "id.pub").write_text("ssh-ed25519 AAAA me@here\n")
    assert inn("ssh-key", "add", str(tmp_path / "id.pub")).out == "1 SHA256:1 mine\n"
    assert server.seen[-1].json == {"public_key": "ssh-ed25519 AAAA me@here"}
    lines = inn("ssh-key", "list").out.splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["ID", "FINGERPRINT"], ["1", "SHA256:1"]]
    assert json.loads(inn("ssh-key", "list", "--json").out)[0]["comment"] == "mine"
    for key in ("1", "SHA256:1"):
        assert inn("ssh-key", "rm", key).out == "removed 1 (SHA256:1)\n"
        assert (server.seen[-1].method, server.seen[-1].path) == ("DELETE", "/v1/ssh-keys/1")
    assert inn("ssh-key", "rm", "2").err == "inn: there is no SSH key '2': see inn ssh-key list\n"


def test_a_private_ssh_key_stays_where_it_is(inn, server, tmp_path):
    (tmp_path / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n")
    ended = inn("ssh-key", "add", str(tmp_path / "id"))
    assert ended.status == 2 and "is a private key" in ended.err
    assert inn("ssh-key", "add", str(tmp_path / "none")).status == 2
    assert server.seen == []


def test_df_shows_whose_takes_how_much(inn, server):
    lines = inn("df", "here").out.splitlines()
    assert lines[0].split("\t") == ["ORGANIZATION", "KIND", "COUNT", "OWN", "SIZE"]
    assert lines[1].split("\t")[:3] == ["a\\x1bb", "disk", "2"] and lines[2].split("\t")[0] == "-"
    assert lines[1].split("\t")[3] != lines[1].split("\t")[4] and lines[3].startswith("together: ")
