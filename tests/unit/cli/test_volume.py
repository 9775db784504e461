from scripted_server import INSTANCE, VM

ID = str(INSTANCE)


def test_makes_lists_and_shows_them_harmless(inn, server):
    assert ID in inn("volume", "create", "models", "100").out
    assert (server.seen[-1].method, server.seen[-1].path) == ("POST", "/v1/volumes")
    assert server.seen[-1].json == {"name": "models", "quota_bytes": 100 << 20}
    lines = inn("volume", "list").out.splitlines()
    assert lines[0].split("\t")[:3] == ["VOLUME", "NAME", "STATUS"]
    row = lines[1].split("\t")
    assert row[:5] == [ID, "na\\x1b[2Jme", "ready", "100", "7"] and row[6] == f"{VM}:/da\\x1bta (rw)"
    shown = inn("volume", "show", ID).out
    assert "na\\x1b[2Jme" in shown and "guest written:" in shown


def test_changes(inn, server):
    assert inn("volume", "rename", ID, "new").status == 0
    assert (server.seen[-1].method, server.seen[-1].json) == ("PATCH", {"name": "new"})
    assert inn("volume", "grow", ID, "200").status == 0 and server.seen[-1].json == {"quota_bytes": 200 << 20}
    assert inn("volume", "rm", ID).out == f"deleted {ID}\n"
    assert (server.seen[-1].method, server.seen[-1].path) == ("DELETE", f"/v1/volumes/{ID}")


def test_mounts(inn, server):
    assert inn("volume", "mount", ID, VM, "/data").out == "mounted at /data (ro)\n"
    assert server.seen[-1].path == f"/v1/vms/{VM}/volumes"
    assert server.seen[-1].json == {"volume_id": ID, "mount_path": "/data", "mode": "rw"}
    inn("volume", "mount", ID, VM, "/data", "--checkpoint", "latest")
    assert server.seen[-1].json == {"volume_id": ID, "mount_path": "/data", "mode": "ro", "checkpoint_id": "latest"}
    assert inn("volume", "unmount", ID, VM, "/data").out == "unmounted from /data\n"
    assert (server.seen[-1].method, server.seen[-1].query) == ("DELETE", {"mount_path": ["/data"]})


def test_checkpoints(inn, server):
    assert ID in inn("volume", "checkpoint", ID, "--name", "n").out
    assert (server.seen[-1].path, server.seen[-1].json) == (f"/v1/volumes/{ID}/checkpoints", {"name": "n"})
    assert inn("volume", "checkpoints", ID).out.splitlines()[1].split("\t")[:3] == [ID, "na\\x1b[2Jme", "ready"]
    assert inn("volume", "rm-checkpoint", ID, "c").status == 0
    assert (server.seen[-1].method, server.seen[-1].path) == ("DELETE", f"/v1/volumes/{ID}/checkpoints/c")


def test_of_a_new_vm(inn, server):
    assert inn("vm", "create", "--volume", f"{ID}:/data", "--volume", f"{ID}:/old:ro:latest").status == 0
    assert server.seen[-1].json["volumes"] == [
        {"volume_id": ID, "mount_path": "/data"},
        {"volume_id": ID, "mount_path": "/old", "mode": "ro", "checkpoint_id": "latest"},
    ]
    seen = len(server.seen)
    for wrong in ("x", f"{ID}:", f"{ID}:/a:ro:b:c"):
        assert inn("vm", "create", "--volume", wrong).status == 2
    assert len(server.seen) == seen
