"""The image store's records: atomic, found again, never half a truth."""

import json
from pathlib import Path

import pytest

from innkeeper.core.image import ImageStatus
from innkeeper.errors import ImageNotFoundError
from innkeeper.host.disks.image_store import ImageRecord, ImageStore


def _add(store: ImageStore, name: str, digest: str, content: bytes = b"erofs") -> ImageRecord:
    with store.workspace() as work:
        (work / "image.erofs").write_bytes(content)
        return store.add(
            ImageRecord(
                name=name, digest=digest, recipe_digest="r", size_bytes=len(content), user="user", workdir="/home/user",
                built_at="2026-01-01T00:00:00+00:00", path=work / "image.erofs", env={"A": "1"}, tools=("git 2",),
            )
        )  # fmt: skip


def test_what_was_added_is_found_by_another_store_object(tmp_path: Path) -> None:
    added = _add(ImageStore(tmp_path), "base", "d1")
    store = ImageStore(tmp_path)
    assert store.get("base") == added == store.by_digest("d1")
    assert store.list() == [added]
    assert added.path.read_bytes() == b"erofs"
    image = added.as_image()
    assert (image.status, image.digest, image.tools, image.env) == (ImageStatus.READY, "d1", ("git 2",), {"A": "1"})


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "older"])
def test_a_damaged_image_counts_as_none(tmp_path: Path, damage: str) -> None:
    store = ImageStore(tmp_path)
    added = _add(store, "base", "d1")
    record = store.directory / "base.json"
    if damage == "missing":
        added.path.unlink()
    elif damage == "truncated":
        added.path.chmod(0o600)
        added.path.write_bytes(b"ero")
    elif damage == "garbage":
        record.write_text('{"name"')
    else:
        table = json.loads(record.read_text())
        del table["recipe_digest"]
        record.write_text(json.dumps(table))
    assert store.get("base") is None
    assert store.list() == []


def test_a_workspace_is_gone_even_after_a_failure(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    with pytest.raises(RuntimeError), store.workspace() as work:
        (work / "tree").mkdir()
        raise RuntimeError
    assert not work.exists()
    assert list(store.directory.iterdir()) == []


@pytest.mark.anyio
async def test_collect_removes_only_what_nobody_names_or_uses(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    for digest in ("d1", "d2", "d3"):
        _add(store, "base", digest)
    assert await store.collect(frozenset({"d1"})) == {"d2": 5}
    assert sorted(path.stem for path in store.directory.glob("*.erofs")) == ["d1", "d3"]
    assert await store.collect(frozenset()) == {"d1": 5}


@pytest.mark.anyio
async def test_what_organizations_made_stays_until_it_is_let_go(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    for digest in ("d1", "d2", "d3"):
        with store.workspace() as work:
            (work / "f").write_bytes(b"erofs")
            assert store.publish(work / "f", digest) == 5 == store.size_of(digest)
    # A start of the daemon, which knows no names.
    assert await ImageStore(tmp_path).collect(frozenset()) == {}
    with store.held("d2"):
        store.release(frozenset({"d1"}))
        assert await store.collect(frozenset()) == {"d3": 5}
    store.release(frozenset({"d1"}))
    assert await store.collect(frozenset({"d2"})) == {}
    assert await store.collect(frozenset()) == {"d2": 5}
    assert (store.size_of("d1"), store.size_of("d2")) == (5, None)


def test_what_is_there_already_stays_for_guests_that_stand_on_it(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    before = _add(store, "base", "d1").path.stat().st_ino
    assert _add(store, "other", "d1").path.stat().st_ino == before
    with store.workspace() as work:
        (work / "f").write_bytes(b"erofs")
        assert store.publish(work / "f", "d1") == 5
        assert list(work.iterdir()) == []
        assert (store.directory / "d1.erofs").stat().st_ino == before
        # One that was cut short is no such file.
        (store.directory / "d1.erofs").chmod(0o600)
        (store.directory / "d1.erofs").write_bytes(b"ero")
        (work / "f").write_bytes(b"erofs")
        assert store.publish(work / "f", "d1") == 5 == store.size_of("d1")


def test_an_unknown_digest_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(ImageNotFoundError):
        ImageStore(tmp_path).mount("nothing")
