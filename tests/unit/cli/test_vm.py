import json

import pytest
from scripted_server import VM


def test_create_sends_what_was_given_and_nothing_else(inn, server, monkeypatch):
    monkeypatch.setenv("SECRET", "s3")
    ended = inn(
        "vm", "create", "--lifetime", "600", "--memory", "512", "--vcpus", "1", "--image", "base", "--idle", "60",
        "--metadata", "team=a=b", "--env", "A=1", "--env", "SECRET", "--driver", "qemu", "--min-isolation", "microvm", "--no-wait",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert server.seen[-1].json == {
        "vm_lifetime_seconds": 600, "memory_mb": 512, "vcpu_count": 1, "image_variant": "base", "idle_seconds": 60,
        "metadata": {"team": "a=b"}, "env": {"A": "1", "SECRET": "s3"}, "driver": "qemu", "min_isolation": "microvm",
    }  # fmt: skip
    assert server.seen[-1].query == {"wait": ["false"]}
    assert VM in ended.out and "s3" not in ended.out
    assert inn("vm", "create").status == 0 and server.seen[-1].json == {}


def test_lists(inn, server):
    lines = inn("vm", "list").out.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["STATUS", "active"]
    assert server.seen[-1].path == "/v1/vms/"
    lines = inn("vm", "list", "--all").out.splitlines()
    assert [line.split("\t")[1] for line in lines[1:]] == ["active", "idle"]
    assert server.seen[-1].path == "/v1/vms/"


def test_show_has_the_events_harmless(inn, server):
    shown = inn("vm", "show", VM).out
    assert "next memory mb:" in shown and "star\\x1b[2Jted" in shown
    assert "vm lifetime seconds:" in shown and '{"team": "a\\u001b"}' in shown
    assert json.loads(inn("vm", "show", VM, "--json").out)["events"][0]["type"] == "ready"


def test_changes(inn, server):
    assert inn("vm", "patch", VM, "--memory", "2048", "--idle", "0").status == 0
    assert (server.seen[-1].method, server.seen[-1].json) == ("PATCH", {"memory_mb": 2048, "idle_seconds": None})
    assert inn("vm", "hold", VM, "60", "--reason", "a build").status == 0
    assert server.seen[-1].json == {"seconds": 60, "reason": "a build"}
    assert inn("vm", "patch", VM, "--auto-suspend", "--no-auto-resume").status == 0
    assert server.seen[-1].json == {"auto_suspend": True, "auto_resume": False}
    assert inn("vm", "rm", VM).out == f"ended {VM}\n"


def test_suspend_and_resume(inn, server):
    assert inn("vm", "suspend", VM).out == f"suspended {VM}\n"
    assert (server.seen[-1].method, server.seen[-1].path) == ("POST", f"/v1/vms/{VM}/suspend")
    resumed = inn("vm", "resume", VM, "--no-wait")
    assert f"{VM}-2" in resumed.out
    assert (server.seen[-1].path, server.seen[-1].query) == (f"/v1/vms/{VM}/resume", {"wait": ["false"]})


@pytest.mark.parametrize(
    "argv", [("patch", VM), ("create", "--metadata", "x"), ("create", "--env", "NOT_SET_ANYWHERE")]
)
def test_incomplete_command_lines(inn, server, argv):
    assert inn("vm", *argv).status == 2
    assert server.seen == []


def test_a_field_that_is_refused_is_named(inn, server):
    server.error = (422, {"detail": [{"loc": ["body", "memory_mb"], "msg": "must be more", "type": "value_error"}]})
    ended = inn("vm", "create")
    assert (ended.status, ended.err) == (1, "inn: memory_mb: must be more\n")


def test_clones_and_forks(inn, server):
    assert f"{VM}-2" in inn("vm", "clone", VM, "--name", "n").out
    assert (server.seen[-1].path, server.seen[-1].json) == (f"/v1/vms/{VM}/clone", {"snapshot_name": "n"})
    lines = inn("vm", "fork", VM, "--count", "2").out.splitlines()
    assert (server.seen[-1].path, server.seen[-1].json) == (f"/v1/vms/{VM}/fork", {"count": 2})
    assert lines[1].split("\t")[:3] == [f"{VM}-2", "s", "active"] and lines[2].split("\t")[2:] == ["error", "a\\x1bb"]
    assert inn("vm", "fork", VM, "--count", "101").status == 2
