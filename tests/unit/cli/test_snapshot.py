from scripted_server import INSTANCE, VM

ID = str(INSTANCE)


def test_take_sends_what_was_given(inn, server):
    taken = inn("snapshot", "take", VM, "--name", "n", "--no-memory", "--no-wait")
    assert taken.status == 0, taken.err
    assert (server.seen[-1].method, server.seen[-1].path) == ("POST", f"/v1/vms/{VM}/snapshot")
    assert server.seen[-1].json == {"name": "n", "memory": False} and server.seen[-1].query == {"wait": ["false"]}
    assert ID in taken.out and "180.5" in taken.out
    assert inn("snapshot", "take", VM).status == 0 and server.seen[-1].json == {"memory": True}


def test_lists_and_shows_it_harmless(inn, server):
    lines = inn("snapshot", "list").out.splitlines()
    assert lines[0].split("\t")[:3] == ["SNAPSHOT", "NAME", "STATUS"]
    assert lines[1].split("\t")[:6] == [ID, "na\\x1b[2Jme", "ready", "disk, memory", "30", "12"]
    shown = inn("snapshot", "show", ID).out
    assert "na\\x1b[2Jme" in shown and "shared bytes:" in shown
    assert server.seen[-1].path == f"/v1/snapshots/{ID}"


def test_changes(inn, server):
    assert inn("snapshot", "rename", ID, "new").status == 0
    assert (server.seen[-1].method, server.seen[-1].json) == ("PATCH", {"name": "new"})
    assert inn("snapshot", "rm", ID).out == f"deleted {ID}\n"
    assert server.seen[-1].method == "DELETE"


def test_of_vms(inn, server):
    assert inn("vm", "create", "--snapshot", ID, "--keep").status == 0
    assert server.seen[-1].json == {"snapshot_id": ID, "snapshot_on_terminate": True}
    assert inn("vm", "patch", VM, "--no-keep").status == 0
    assert server.seen[-1].json == {"snapshot_on_terminate": False}


def test_a_verification_says_each_check_and_fails_where_one_does(inn, server):
    checks = [("disk", True), ("agent", False), ("sentinel", None)]
    server.snapshot = {"checks": [{"name": name, "ok": ok, "detail": "d\x1b"} for name, ok in checks]}
    said = inn("snapshot", "verify", ID)
    assert (said.status, server.seen[-1].method, server.seen[-1].path) == (0, "POST", f"/v1/snapshots/{ID}/verify")
    assert [line.split("\t")[:2] for line in said.out.splitlines()[1:]] == [
        ["disk", "ok"], ["agent", "FAILED"], ["sentinel", "not told"],
    ]  # fmt: skip
    assert "\x1b" not in said.out
    server.snapshot["damaged"] = True
    assert inn("snapshot", "verify", ID).status == 1 and inn("snapshot", "verify", ID, "--json").status == 1


def test_a_build_sends_what_was_given_and_follows(inn, server, monkeypatch):
    monkeypatch.setenv("TOKEN", "from the environment")
    words = (
        "--apt",
        "git curl",
        "--git",
        "https://h/x",
        "--run",
        "make",
        "--disk",
        "2",
        "--env",
        "TOKEN",
        "--env",
        "A=1",
    )
    built = inn("snapshot", "build", "docker://r.example/a:1", "--name", "n", *words)
    assert built.status == 0, built.err
    begun = next(one for one in server.seen if one.path == "/v1/snapshots" and one.method == "POST")
    assert begun.json == {
        "oci_image": "r.example/a:1", "name": "n", "vcpu_count": 2, "memory_mb": 512,
        "build_args": {
            "extra_apt_packages": "git curl", "git_clone_url": "https://h/x", "post_build_cmd": "make", "disk_size_gb": 2,
            "envs": {"TOKEN": "from the environment", "A": "1"},
        },
    }  # fmt: skip
    assert server.seen[-1].path == f"/v1/snapshots/{ID}/log"
    assert built.out.splitlines() == ["unpacking", "[build 1/2] extra_apt_packages git", "half", f"built {ID}"]
    assert inn("snapshot", "build", "r.example/a:1", "--no-wait").out == f"building {ID}\n"


def test_a_build_that_failed_is_told_by_status_and_text(inn, server):
    server.snapshot_end = {"status": "failed", "error": "no\x1bsuch image", "digest": None}
    for words in (("build", "r.example/a:1"), ("log", ID)):
        failed = inn("snapshot", *words)
        assert failed.status == 1 and failed.err == "inn: failed: no\\x1bsuch image\n"
