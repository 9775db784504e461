"""`inn retention`: what it asks for and prints."""

from __future__ import annotations

from typing import Any

from scripted_server import INSTANCE

ID = str(INSTANCE)
RULE = {"keep_last": None, "max_age_days": None, "max_bytes": None}


def test_show(inn: Any, server: Any) -> None:
    said = inn("retention", "show")
    assert server.seen[-1].path == "/v1/retention"
    assert said.status == 0, said.err
    lines = said.out.splitlines()
    assert lines[1].split("\t") == ["snapshots", "3", "-", "-"]
    assert lines[2].split("\t")[0] == "volume_checkpoints"


def test_set_tells_first_what_would_go(inn: Any, server: Any) -> None:
    told = inn("retention", "set", "volume-checkpoints", "--max-age-days", "7")
    assert (
        told.status == 0 and f"snapshots\t{ID}\tna\\x1b[2Jme" in told.out and "set it with --yes" in told.out + told.err
    )
    wanted = {"snapshots": {**RULE, "keep_last": 3}, "volume_checkpoints": {**RULE, "max_age_days": 7}}
    assert (server.seen[-1].method, server.seen[-1].path, server.seen[-1].json) == (
        "POST", "/v1/retention/apply", {"policy": wanted},
    )  # fmt: skip
    assert inn("retention", "set", "volume-checkpoints", "--max-age-days", "7", "--yes").status == 0
    assert (server.seen[-1].method, server.seen[-1].path, server.seen[-1].json) == ("PUT", "/v1/retention", wanted)


def test_apply_removes_with_yes_alone(inn: Any, server: Any) -> None:
    for more, remove in (((), False), (("--yes",), True)):
        assert inn("retention", "apply", *more).status == 0
        assert server.seen[-1].json == {"remove": remove}
