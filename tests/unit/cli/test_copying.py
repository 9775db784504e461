import json
import os
from pathlib import Path

import pytest

from innkeeper.cli.copying import local_name
from innkeeper.cli.guest_files import RoomPlace, VmPlace, parse_place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("base/r:/etc/x", RoomPlace("base", "r", b"/etc/x")),
        ("base/a/b:c:/x:/y", RoomPlace("base", "a/b:c", b"/x:/y")),
        ("./base/r:/x", Path("./base/r:/x")),
        ("../r:/x", Path("../r:/x")),
        ("/a/b:/c", Path("/a/b:/c")),
        ("base/r", Path("base/r")),
        ("file", Path("file")),
        ("vm_abc:/etc/x", VmPlace("vm_abc", b"/etc/x")),
        ("vm_abc-2:a:b", VmPlace("vm_abc-2", b"a:b")),
        ("vm_abc:", VmPlace("vm_abc", b".")),
        ("vm_abc", Path("vm_abc")),
        ("./vm_abc:x", Path("./vm_abc:x")),
        ("vm_profile/r:/x", RoomPlace("vm_profile", "r", b"/x")),
    ],
)
def test_parse_place(text, place):
    assert parse_place(text) == place


@pytest.mark.parametrize(
    ("name", "local"),
    [
        (b"b", "b"),
        (b"\x1b\n", "\x1b\n"),
        (b"\xff", os.fsdecode(b"\xff")),
        (b"..", None),
        (b".", None),
        (b"", None),
        (b"b/c", None),
        (b"b\0", None),
    ],
)
def test_local_names(name, local):
    assert local_name(name) == local


def test_a_file_out_and_in(inn, server, tmp_path):
    server.files = {b"/tmp/a b?": b"content"}
    assert inn("cp", "base/r:/tmp/a b?", str(tmp_path / "x")).status == 0
    assert (tmp_path / "x").read_bytes() == b"content"
    assert inn("cp", str(tmp_path / "x"), "base/r:/new/#%y").status == 0
    assert server.files[b"/new/#%y"] == b"content"


def test_into_directories(inn, server, tmp_path):
    server.files = {b"/d/f": b"1"}
    assert inn("cp", "base/r:/d/f", str(tmp_path)).status == 0
    assert (tmp_path / "f").read_bytes() == b"1"
    assert inn("cp", str(tmp_path / "f"), "base/r:/d").status == 0
    assert inn("cp", str(tmp_path / "f"), "base/r:/e/").status == 0
    assert set(server.files) == {b"/d/f", b"/e/f"}


def test_a_directory_out_page_by_page(inn, server, tmp_path):
    server.files = {b"/d/%d" % i: b"%d" % i for i in range(5)} | {b"/d/sub/deep/f": b"x", b"/d/\xff": b"y"}
    ended = inn("cp", "base/r:/d", str(tmp_path / "out"))
    assert ended.status == 0, ended.err
    found = {
        os.fsencode(p.relative_to(tmp_path / "out")): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert found == {path[3:]: content for path, content in server.files.items()}
    assert (tmp_path / "out" / "0").stat().st_mode & 0o7777 == 0o755  # the guest said 4755


def test_a_directory_in(inn, server, tmp_path):
    (tmp_path / "t" / "sub").mkdir(parents=True)
    (tmp_path / "t" / "a").write_bytes(b"1")
    (tmp_path / "t" / "sub" / "b").write_bytes(b"")
    (tmp_path / "t" / "link").symlink_to("/etc/passwd")
    ended = inn("cp", str(tmp_path / "t"), "base/r:/t")
    assert ended.status == 1 and "skipped" in ended.err and "link" in ended.err
    assert server.files == {b"/t/a": b"1", b"/t/sub/b": b""}


def test_links_and_devices_of_a_guest_are_not_made(inn, server, tmp_path):
    server.files = {b"/d/link": "symlink", b"/d/fifo": "other", b"/d/f": b"1"}
    ended = inn("cp", "base/r:/d", str(tmp_path / "out"))
    assert ended.status == 1 and ended.err.count("skipped") == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["f"]


@pytest.mark.parametrize("hostile", ["/d/..%2f..%2fescape", "/d/%2e%2e", "/d/../../escape/..", "/d/"])
def test_hostile_names_never_leave_the_target(inn, server, tmp_path, hostile):
    server.files = {b"/d/f": b"evil"}
    server.name_override = hostile
    before = set(tmp_path.rglob("*"))
    ended = inn("cp", "base/r:/d", str(tmp_path / "out"))
    assert ended.status == 1 and "not a name for a file here" in ended.err
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "out"}


def test_a_local_link_is_replaced_not_followed(inn, server, tmp_path):
    (tmp_path / "victim").write_text("keep")
    (tmp_path / "target").symlink_to(tmp_path / "victim")
    server.files = {b"/f": b"new"}
    assert inn("cp", "base/r:/f", str(tmp_path / "target")).status == 0
    assert (tmp_path / "victim").read_text() == "keep" and not (tmp_path / "target").is_symlink()


def test_a_cut_download_leaves_the_old_file(inn, server, tmp_path):
    (tmp_path / "f").write_text("old")
    server.files, server.cut = {b"/f": b"something long"}, True
    assert inn("cp", "base/r:/f", str(tmp_path / "f")).status == 1
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


def test_what_is_missing(inn, server, tmp_path):
    ended = inn("cp", "base/r:/no", str(tmp_path / "x"))
    assert (ended.status, ended.err) == (1, "inn: File '/no' not found\n")
    assert inn("cp", str(tmp_path / "no"), "base/r:/x").status == 1
    assert inn("cp", "a", "b").status == 2
    assert inn("cp", "base/r:/a", "base/r:/b").status == 2


def test_ls_and_cat(inn, server):
    server.files = {b"/d/a\x1b": b"1\x1b\n", b"/d/\xff": b"22"}
    ended = inn("ls", "base/r:/d")
    assert ended.status == 0 and [line.split("\t")[::4] for line in ended.out.splitlines()[1:]] == [
        ["file", "a\\x1b"],
        ["file", "\\udcff"],
    ]
    assert [row["name"] for row in json.loads(inn("ls", "--json", "base/r:/d").out)] == ["a\x1b", "\ufffd"]
    assert inn("cat", "base/r:/d/a\x1b").out == "1\x1b\n"
    assert inn("cat", "base/r:/none").status == 1
    for command in ("ls", "cat"):
        assert inn(command, "local").status == 2
