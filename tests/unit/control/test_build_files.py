from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest

from innkeeper.control import build_files
from innkeeper.control.build_files import index_context, is_archive, tar_of, tar_of_texts
from innkeeper.core.build_context import select
from innkeeper.errors import InvalidRequestError

pytestmark = pytest.mark.anyio


def tar(*members: tuple[str, bytes | None, dict[str, Any]], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content, fields in members:
            info = tarfile.TarInfo(name)
            info.size = 0 if content is None else len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, None if content is None else io.BytesIO(content))
    return buffer.getvalue()


DIR = {"type": tarfile.DIRTYPE}
GOOD = tar(
    ("./", None, DIR),
    ("b/deep/x", b"x" * 700_000, {"mode": 0o755, "mtime": 1e9}),
    ("a", b"hello", {}),
    ("link", None, {"type": tarfile.SYMTYPE, "linkname": "a"}),
    ("n" * 300, b"long", {}),
    ("empty", None, DIR),
)


async def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "context.tar"
    path.write_bytes(content)
    return path


async def test_a_context_is_indexed_and_made_into_a_stream_again(tmp_path: Path) -> None:
    path = await written(tmp_path, GOOD)
    index = index_context(path)
    assert sorted(index) == sorted(["b", "b/deep", "b/deep/x", "a", "link", "n" * 300, "empty"])
    stream = b"".join([piece async for piece in tar_of(path, select(index, ["."]))])
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        assert archive.getnames() == sorted(index)
        big = archive.getmember("b/deep/x")
        assert (big.mode, big.mtime, big.uid) == (0o755, 1e9, 0)
        member = archive.extractfile(big)
        assert member is not None and member.read() == b"x" * 700_000
        assert archive.getmember("link").linkname == "a"
    assert b"".join([piece async for piece in build_files.bytes_of(path, index["a"])]) == b"hello"


async def test_equal_contents_have_equal_digests_and_gnu_names_are_read(tmp_path: Path) -> None:
    index = index_context(await written(tmp_path, tar(("a", b"1", {}), ("z" * 200, b"1", {}), form=tarfile.GNU_FORMAT)))
    assert index["a"].digest == index["z" * 200].digest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"garbage" * 1_000, "not a tar stream"),
        (GOOD[:100_000], "not a tar stream|middle of a file"),
        (tar(("../x", b"", {})), "no name"),
        (tar(("a/../../x", b"", {})), "no name"),
        (tar(("/etc/passwd", b"", {})), "no name"),
        (tar(("a", None, {"type": tarfile.CHRTYPE})), "neither a file"),
        (tar(("a", None, {"type": tarfile.FIFOTYPE})), "neither a file"),
        (tar(("a", b"", {}), ("b", None, {"type": tarfile.LNKTYPE, "linkname": "a"})), "neither a file"),
        (tar(("a", b"", {}), ("a/b", b"", {})), "lies below a file"),
        (tar(("x", b"", {"pax_headers": {"comment": "c" * 3_000_000}})), "too long"),
        (tar(("y" * 5_000, b"", {})), "no name"),
    ],
)
async def test_a_stream_that_no_client_of_ours_sends_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        index_context(await written(tmp_path, content))


async def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_files, "FILES_MAX", 3)
    with pytest.raises(InvalidRequestError, match="more than 3 files"):
        index_context(await written(tmp_path, GOOD))


def test_archives_are_known_by_their_content() -> None:
    for archive in (GOOD, gzip.compress(GOOD), bz2.compress(GOOD), lzma.compress(GOOD)):
        assert is_archive(archive[:262_144])
    for other in (b"", b"x" * 1_000, gzip.compress(b"no tar" * 100), b"\x1f\x8bgarbage", b"BZhgarbage", b"\xfd7zXZ\0x"):
        assert not is_archive(other)


async def test_texts_become_files() -> None:
    stream = b"".join([piece async for piece in tar_of_texts([("a", b"1"), ("b", b"")])])
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        assert [(member.name, member.size, member.mode) for member in archive] == [("a", 1, 0o644), ("b", 0, 0o644)]
