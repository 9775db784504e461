"""Templates as folders: whole or not there, found by all that they depend on, and refused when damaged."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from innkeeper.host.disks.template_store import DISK, MEMORY, TemplateKey, TemplateStore, digest_of
from innkeeper.host.linux.sparse import PIECE_BYTES, copy_sparse

KEY = TemplateKey("qemu", {"qemu": "7.2.22", "kernel": "6.1"}, "a" * 64, 1, 256, 1024, "user", ("true",))


def fill(draft: Path, content: bytes = b"memory") -> None:
    (draft / DISK).write_bytes(b"disk")
    (draft / MEMORY).mkdir()
    (draft / MEMORY / "ram").write_bytes(content)


def make(store: TemplateStore, key: TemplateKey = KEY) -> None:
    with store.draft() as draft:
        fill(draft)
        store.publish(draft, key)


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    return TemplateStore(tmp_path / "templates")


def again(store: TemplateStore, tmp_path: Path) -> TemplateStore:
    """As the next daemon sees it, which has looked at nothing yet."""
    return TemplateStore(tmp_path / "templates")


def test_what_was_published_is_found_by_its_key_and_cannot_be_written(store: TemplateStore) -> None:
    make(store)
    with store.reading(KEY) as template:
        assert template is not None
        assert (template.disk.read_bytes(), (template.memory / "ram").read_bytes()) == (b"disk", b"memory")
        for path in (template.disk, template.memory / "ram"):
            assert path.stat().st_mode & 0o777 == 0o444
        assert store.is_whole(template)
        # Nobody takes it away from who reads it.
        assert not store.drop(KEY.digest)
    assert store.drop(KEY.digest) and not store.drop(KEY.digest)
    with store.reading(KEY) as template:
        assert template is None


@pytest.mark.parametrize(
    "other",
    [
        {"driver": "firecracker"},
        {"needs": {"qemu": "7.2.23", "kernel": "6.1"}},
        {"needs": {"qemu": "7.2.22"}},
        {"image_digest": "b" * 64},
        {"vcpu_count": 2},
        {"memory_mb": 512},
        {"disk_mb": 2048},
        {"user": "root"},
        {"warmed": ()},
    ],
)
def test_each_thing_that_a_guests_state_depends_on_is_in_the_key(
    store: TemplateStore, other: dict[str, object]
) -> None:
    make(store)
    with store.reading(replace(KEY, **other)) as template:  # type: ignore[arg-type]
        assert template is None


def test_a_draft_that_is_given_up_leaves_nothing(store: TemplateStore, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), store.draft() as draft:
        fill(draft)
        raise RuntimeError
    assert list((tmp_path / "templates").iterdir()) == []


@pytest.mark.parametrize("damage", ["changed", "shortened", "missing", "another file's"])
def test_a_damaged_template_is_not_taken_for_whole(store: TemplateStore, tmp_path: Path, damage: str) -> None:
    make(store)
    ram = tmp_path / "templates" / KEY.digest / MEMORY / "ram"
    ram.chmod(0o600)
    if damage == "missing":
        ram.unlink()
    elif damage == "shortened":
        os.truncate(ram, 3)
    else:
        ram.write_bytes(b"disk" if damage == "another file's" else b"mEmory")
    later = again(store, tmp_path)
    with later.reading(KEY) as template:
        assert template is not None
        assert not later.is_whole(template)


def test_what_is_no_template_is_told_apart(store: TemplateStore, tmp_path: Path) -> None:
    make(store)
    folder = tmp_path / "templates"
    (folder / "junk").mkdir()
    # A template under another's name is nobody's: its key says what it is.
    moved = replace(KEY, memory_mb=512).digest
    shutil.copytree(folder / KEY.digest, folder / moved)
    (folder / ("f" * 64)).mkdir()
    assert [template.key for template in store.all()] == [KEY]
    assert {path.name for path in store.unreadable()} == {"junk", moved, "f" * 64}
    with store.reading(replace(KEY, memory_mb=512)) as template:
        assert template is None


def test_the_one_that_was_not_used_for_longest_comes_first(store: TemplateStore, tmp_path: Path) -> None:
    keys = [replace(KEY, memory_mb=size) for size in (256, 512, 1024)]
    for age, key in enumerate(keys):
        make(store, key)
        os.utime(tmp_path / "templates" / key.digest, (1000 - age, 1000 - age))
    assert [template.key for template in store.all()] == keys[::-1]
    with store.reading(keys[2]):
        pass
    assert [template.key for template in store.all()] == [keys[1], keys[0], keys[2]]


def test_a_sparse_copy_is_the_same_and_as_sparse(tmp_path: Path) -> None:
    one, other, zeros = tmp_path / "one", tmp_path / "other", tmp_path / "zeros"
    with one.open("wb") as file:
        file.truncate(64 * PIECE_BYTES + 5)
        # Across the border of two pieces, and at the very end.
        for at in (3 * PIECE_BYTES - 2, 40 * PIECE_BYTES + 7, 64 * PIECE_BYTES + 2):
            os.pwrite(file.fileno(), b"abc", at)
    with one.open("rb") as source, other.open("wb") as target:
        target.truncate(64 * PIECE_BYTES + 5)
        copy_sparse(source.fileno(), target.fileno())
    assert one.read_bytes() == other.read_bytes()
    assert other.stat().st_blocks * 512 <= 6 * PIECE_BYTES
    # However the holes lie.
    zeros.write_bytes(one.read_bytes())
    assert digest_of(one) == digest_of(other) == digest_of(zeros)
    with other.open("r+b") as file:
        file.truncate(64 * PIECE_BYTES + 6)
    assert digest_of(one) != digest_of(other)
