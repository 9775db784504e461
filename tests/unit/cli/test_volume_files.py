"""`inn volume files`: what goes through, under which path, and what is left of what breaks off."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_server import INSTANCE

ID = str(INSTANCE)
FILES = f"/v1/volumes/{ID}/files"


def test_lists_them_harmless(inn: Any, server: Any) -> None:
    lines = inn("volume", "files", "ls", ID, "a/", "--shallow", "--limit", "5").out.splitlines()
    assert lines[0].split("\t") == ["TYPE", "MODE", "SIZE", "MODIFIED", "PATH"]
    assert lines[1].split("\t")[0:3] == ["file", "0644", "3"] and lines[1].endswith("a\\x1bb/c")
    assert (server.seen[-1].path, server.seen[-1].query) == (
        FILES, {"prefix": ["a/"], "recursive": ["false"], "limit": ["5"]},
    )  # fmt: skip
    assert "there may be more" in inn("volume", "files", "ls", ID, "--limit", "1").err


def test_into_it_and_out_of_it(inn: Any, server: Any, tmp_path: Path) -> None:
    source = tmp_path / "sour\udcffce"
    source.write_bytes(b"\0\xff" * 700_000)
    assert inn("volume", "files", "put", ID, str(source), "in/").status == 0
    sent = server.seen[-1]
    assert (sent.method, sent.path) == ("PUT", f"{FILES}/content") and sent.query["path"][0].startswith("b64:")
    assert sent.headers["content-length"] == "1400000" and sent.body == source.read_bytes()
    assert inn("volume", "files", "put", ID, str(source), "a/b", "--keep").out.startswith("a/b, ")
    assert server.seen[-1].query == {"path": ["a/b"], "overwrite": ["false"]}
    assert inn("volume", "files", "get", ID, "a/b", str(tmp_path)).status == 0
    assert (tmp_path / "b").read_bytes() == source.read_bytes()
    assert inn("volume", "files", "rm", ID, "a", "--recursive").out == "deleted a\n"
    assert (server.seen[-1].method, server.seen[-1].query) == ("DELETE", {"path": ["a"], "recursive": ["true"]})


def test_standard_input_and_output(inn: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"some words")))
    assert inn("volume", "files", "put", ID, "-", "in/").status == 2
    assert inn("volume", "files", "put", ID, "-", "a").status == 0
    assert server.seen[-1].body == b"some words" and "content-length" not in server.seen[-1].headers
    assert inn("volume", "files", "get", ID, "a", "-").out == "some words"


def test_what_breaks_off_leaves_nothing(inn: Any, server: Any, tmp_path: Path) -> None:
    server.files[b"/volume/a"] = b"some words"
    target = tmp_path / "here"
    target.write_text("as before")
    server.cut = True
    assert inn("volume", "files", "get", ID, "a", str(target)).status != 0
    assert target.read_text() == "as before" and list(tmp_path.glob(".*")) == []
    missing = inn("volume", "files", "get", ID, "b", str(target))
    assert missing.status == 1 and "no such file" in missing.err
    assert inn("volume", "files", "put", ID, str(tmp_path / "none"), "a").status == 1
    assert inn("volume", "files", "get", ID, "a/..", str(tmp_path)).status == 2
