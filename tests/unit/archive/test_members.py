"""A backup's archive: what went in comes out, sparse and whole; anything else is noticed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from innkeeper.archive.members import END, ArchiveError, ArchiveWriter, Entry, extents, members, valid_name

MIB = 1 << 20


def sparse_file(path: Path, size: int, pieces: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces.items():
            os.pwrite(file.fileno(), data, offset)
    return path


def packed(*files: tuple[str, Path | bytes]) -> tuple[bytes, list[Entry]]:
    writer, pieces = ArchiveWriter(), []
    for name, content in files:
        if isinstance(content, bytes):
            pieces += list(writer.text(name, content))
        else:
            with content.open("rb") as file:
                pieces += list(writer.file(name, file.fileno()))
    return b"".join((*pieces, END)), writer.entries


def unpack(archive: bytes, folder: Path) -> list[Entry]:
    found = []
    for member in members(io.BytesIO(archive)):
        path = folder / member.name.replace("/", "_")
        with path.open("xb") as file:
            found.append(member.save(file.fileno()))
    return found


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """64 MiB with 3 MiB of data: in front, in the middle, and a hole at the end."""
    pieces = {0: b"a" * MIB, 20 * MIB: os.urandom(MIB), 40 * MIB + 4096: b"b" * MIB}
    return sparse_file(tmp_path / "disk.img", 64 * MIB, pieces)


def test_what_goes_in_comes_out(tmp_path: Path, disk: Path) -> None:
    archive, entries = packed(("host/disks/a.img", disk), ("api/master.key", b"key\n"), ("host/empty", b""))
    assert len(archive) < 4 * MIB
    out = tmp_path / "out"
    out.mkdir()
    assert unpack(archive, out) == entries
    restored = out / "host_disks_a.img"
    assert restored.read_bytes() == disk.read_bytes()
    assert restored.stat().st_blocks <= disk.stat().st_blocks + 64
    assert (out / "api_master.key").read_bytes() == b"key\n"
    plain = entries[1]
    assert plain.sha256 == hashlib.sha256(b"key\n").hexdigest()


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_gnu_tar_reads_it(tmp_path: Path, disk: Path) -> None:
    all_hole = sparse_file(tmp_path / "hole.img", 5 * MIB, {})
    archive, _ = packed(("host/disks/a.img", disk), ("host/disks/hole.img", all_hole), ("manifest.json", b"{}"))
    (tmp_path / "b.tar").write_bytes(archive)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "-xSf", tmp_path / "b.tar", "-C", out], check=True)
    assert (out / "host/disks/a.img").read_bytes() == disk.read_bytes()
    assert (out / "host/disks/hole.img").read_bytes() == all_hole.read_bytes()
    assert (out / "manifest.json").read_bytes() == b"{}"


@settings(max_examples=60)
@given(data=st.data())
def test_any_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("any")
    size = data.draw(st.integers(0, 200_000))
    offsets = data.draw(st.lists(st.integers(0, max(0, size - 1)), max_size=5))
    path = sparse_file(folder / "in", size, {at: b"x" * min(5_000, size - at) for at in offsets})
    archive, entries = packed(("f", path))
    assert unpack(archive, folder) == entries
    assert (folder / "f").read_bytes() == path.read_bytes()
    shutil.rmtree(folder)


def test_extents_of_a_file_without_holes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 10_000)
    with path.open("rb") as file:
        assert extents(file.fileno()) == [(0, 10_000)]


def test_every_cut_is_noticed(tmp_path: Path, disk: Path) -> None:
    archive, _ = packed(("a", b"one"), ("b.img", disk))
    for at, cut in enumerate((0, 100, 512, 515, 1024, 2000, len(archive) // 2, len(archive) - len(END) - 1)):
        folder = tmp_path / f"cut{at}"
        folder.mkdir()
        with pytest.raises(ArchiveError, match="ends too early"):
            unpack(archive[:cut], folder)


def test_a_changed_byte_changes_the_digest(tmp_path: Path, disk: Path) -> None:
    archive, entries = packed(("b.img", disk))
    at = archive.index(b"a" * 512) + 5
    changed = archive[:at] + b"!" + archive[at + 1 :]
    (found,) = unpack(changed, tmp_path)
    assert found.sha256 != entries[0].sha256


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", ".hidden", "a//b", "", "a\nb", "a/.b", "x" * 300])
def test_names_that_lead_elsewhere(name: str) -> None:
    assert not valid_name(name)
    with pytest.raises(ValueError, match="not a name"):
        packed((name, b""))


def forged(kind: bytes = b"0", name: str = "f", records: dict[str, str] | None = None, body: bytes = b"") -> bytes:
    import tarfile

    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = len(body), kind, records or {}
    return info.tobuf(tarfile.PAX_FORMAT) + body + bytes(-len(body) % 512) + END


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "f"}


def block(text: str) -> bytes:
    return text.encode().ljust(512, b"\0")


def hostile() -> Iterator[tuple[str, bytes]]:
    yield "a link", forged(b"2")
    yield "a device", forged(b"3")
    yield "a directory", forged(b"5", "d")
    yield "a name that leads up", forged(name="../f")
    yield (
        "a name in the extension that leads up",
        forged(records={**SPARSE, "GNU.sparse.name": "../../etc/x", "GNU.sparse.realsize": "1"}),
    )
    yield (
        "an extent beyond the end",
        forged(records={**SPARSE, "GNU.sparse.realsize": "10"}, body=block("1\n5\n100\n") + b"x" * 100),
    )
    yield (
        "more data than the map",
        forged(records={**SPARSE, "GNU.sparse.realsize": "10"}, body=block("1\n0\n2\n") + b"x" * 100),
    )
    yield (
        "less data than the map",
        forged(records={**SPARSE, "GNU.sparse.realsize": "1000"}, body=block("1\n0\n900\n") + b"x"),
    )
    yield "a map without an end", forged(records={**SPARSE, "GNU.sparse.realsize": "10"}, body=block("9\n1\n"))
    yield "a map of words", forged(records={**SPARSE, "GNU.sparse.realsize": "10"}, body=block("x\n"))
    yield "a map of billions", forged(records={**SPARSE, "GNU.sparse.realsize": "10"}, body=block("9999999999\n"))
    yield "a negative size", forged(records={**SPARSE, "GNU.sparse.realsize": "-1"})
    yield "nonsense", b"\xff" * 4096


@pytest.mark.parametrize(("what", "archive"), list(hostile()), ids=[what for what, _ in hostile()])
def test_archives_of_others(tmp_path: Path, what: str, archive: bytes) -> None:
    with pytest.raises(ArchiveError):
        unpack(archive, tmp_path)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 3 * MIB)
    with path.open("r+b") as file:
        pieces = ArchiveWriter().file("f", file.fileno())
        next(pieces)
        next(pieces)
        file.truncate(MIB)
        with pytest.raises(ValueError, match="changed while it was read"):
            list(pieces)
