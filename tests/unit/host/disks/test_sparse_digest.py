"""The checksum of a disk's file: of its content, wherever its holes are."""

from __future__ import annotations

from pathlib import Path

import pytest

from innkeeper.host.disks.sparse_digest import BLOCK_BYTES, sparse_digest

SIZE = 40 * BLOCK_BYTES + 1_000


def made(path: Path, pieces: dict[int, bytes], *, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for at, piece in pieces.items():
            file.seek(at)
            file.write(piece)
    return path


PIECES = {0: b"first", 5 * BLOCK_BYTES - 3: b"across", 20 * BLOCK_BYTES: b"x" * BLOCK_BYTES, SIZE - 4: b"last"}


def test_zeros_are_holes(tmp_path: Path) -> None:
    whole = bytearray(SIZE)
    for at, piece in PIECES.items():
        whole[at : at + len(piece)] = piece
    written = tmp_path / "written"
    written.write_bytes(whole)
    assert sparse_digest(made(tmp_path / "sparse", PIECES)) == sparse_digest(written)


@pytest.mark.parametrize(
    "changed",
    [
        {**PIECES, 0: b"farst"},
        {**PIECES, 5 * BLOCK_BYTES - 3: b"acroSs"},
        {**PIECES, SIZE - 4: b"lost"},
        {**PIECES, 33 * BLOCK_BYTES: b"\1"},
        {at if at != 20 * BLOCK_BYTES else 21 * BLOCK_BYTES: piece for at, piece in PIECES.items()},
        {at: piece for at, piece in PIECES.items() if at},
    ],
    ids=["first byte", "across blocks", "end", "more", "moved", "gone"],
)
def test_whatever_changes_is_seen(tmp_path: Path, changed: dict[int, bytes]) -> None:
    assert sparse_digest(made(tmp_path / "a", PIECES)) != sparse_digest(made(tmp_path / "b", changed))


def test_a_size_counts(tmp_path: Path) -> None:
    short, long = (
        sparse_digest(made(tmp_path / str(size), {0: b"x"}, size=size)) for size in (BLOCK_BYTES, 2 * BLOCK_BYTES)
    )
    assert short != long
    assert sparse_digest(made(tmp_path / "empty", {}, size=0)) != short


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    made(tmp_path / "disk", PIECES)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with pytest.raises(OSError, match="symbolic"):
        sparse_digest(tmp_path / "link")
