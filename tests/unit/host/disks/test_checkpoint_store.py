"""Checkpoints on disk: whole or not there, never taken away under a reader, never believed when they are damaged."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from innkeeper.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    ConflictError,
    MemoryUnusableError,
    UnavailableError,
)
from innkeeper.host import temporary
from innkeeper.host.disks.checkpoint_store import (
    DISK,
    MEMORY,
    Checkpoint,
    CheckpointStore,
    SavedMemory,
    boot_id,
    load,
    saved_files,
    written_files,
)
from innkeeper.host.drivers.gvisor_checkpoint import reason_of
from innkeeper.host.drivers.memory_needs import cpu_digest

NEEDS = {"runsc": "1", "cpu": "x"}
AGENT = "0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    (tmp_path / "pool").mkdir()
    (tmp_path / "agents" / AGENT).mkdir(parents=True)
    (tmp_path / "agents" / AGENT / "inn-agent").touch()
    return CheckpointStore(tmp_path / "pool" / "checkpoints")


def fill(draft: Path) -> Checkpoint:
    (draft / DISK).write_bytes(b"disk")
    (draft / MEMORY).mkdir()
    (draft / MEMORY / "pages.img").write_bytes(b"pages" * 1_000)
    memory = SavedMemory("gvisor", AGENT, 1, 512, NEEDS, saved_files(draft / MEMORY))
    return Checkpoint(uuid4(), uuid4(), 1.5, "a" * 64, 2_048, 4_096, draft, memory)


def publish(store: CheckpointStore) -> Checkpoint:
    with store.draft() as draft:
        return store.publish(draft, fill(draft))


def test_what_is_published_is_found_and_what_is_not_is_gone(store: CheckpointStore, tmp_path: Path) -> None:
    with store.draft() as draft:
        wanted = fill(draft)
        assert store.all() == [] and store.images() == set()
        # Somebody makes it: it is not abandoned.
        assert temporary.abandoned(tmp_path) == []
        made = store.publish(draft, wanted)
    assert made == wanted == store.get(wanted.id)
    assert made.disk.read_bytes() == b"disk"
    assert made.memory is not None and made.memory.size_bytes == 5_000
    assert (store.images(), store.agents()) == ({"a" * 64}, {AGENT})
    with pytest.raises(InterruptedError), store.draft() as draft:
        fill(draft)
        raise InterruptedError
    assert [path.name for path in (tmp_path / "pool" / "checkpoints").iterdir()] == [str(wanted.id)]


def test_a_taken_id_keeps_what_it_names(store: CheckpointStore) -> None:
    made = publish(store)
    with store.draft() as draft, pytest.raises(ConflictError):
        store.publish(draft, replace(fill(draft), id=made.id))
    assert store.all() == [made]


def test_one_that_is_read_is_not_dropped(store: CheckpointStore) -> None:
    made = publish(store)
    with store.reading(made.id), store.reading(made.id), pytest.raises(ConflictError, match="being restored"):
        store.drop(made.id)
    assert store.drop(made.id)
    assert not store.drop(made.id)
    with pytest.raises(CheckpointNotFoundError), store.reading(made.id):
        pass


def test_a_drop_that_was_cut_off_is_half_made_to_the_next_start(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = publish(store)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    assert store.drop(made.id)
    monkeypatch.undo()
    assert store.all() == []
    (left,) = temporary.abandoned(tmp_path)
    temporary.remove(left)
    assert list((tmp_path / "pool" / "checkpoints").iterdir()) == []


def unsealed(store: CheckpointStore, **changes: Any) -> Checkpoint:
    """One whose memory has no checksums yet."""
    with store.draft() as draft:
        wanted = fill(draft)
        assert wanted.memory is not None
        memory = replace(wanted.memory, files=written_files(draft / MEMORY), boot=boot_id())
        return store.publish(draft, replace(wanted, memory=memory, **changes), durable=False)


def believed(store: CheckpointStore, made: Checkpoint, agents: Path) -> SavedMemory:
    found = store.get(made.id)
    memory = found.check_memory(driver="gvisor", needs=NEEDS, agents=agents)
    found.check_whole()
    return memory


def test_memory_without_checksums_is_believed_until_the_host_goes_down(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, agents = unsealed(store), tmp_path / "agents"
    assert believed(store, made, agents).size_bytes == 5_000
    monkeypatch.setattr("innkeeper.host.disks.checkpoint_store.boot_id", lambda: "another")
    with pytest.raises(MemoryUnusableError, match="went down"):
        believed(store, made, agents)
    assert not store.seal(made.id)
    monkeypatch.undo()
    os.truncate(made.memory_folder / "pages.img", 10)
    with pytest.raises(CheckpointDamagedError):
        believed(store, made, agents)


def test_sealed_memory_is_believed_by_its_checksums(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = unsealed(store)
    assert store.seal(made.id)
    assert not store.seal(made.id) and not store.seal(uuid4())
    assert [path.name for path in sorted(made.folder.iterdir())] == [DISK, "manifest.json", MEMORY]
    monkeypatch.setattr("innkeeper.host.disks.checkpoint_store.boot_id", lambda: "another")
    assert believed(store, made, tmp_path / "agents").files == saved_files(made.memory_folder)
    (made.memory_folder / "pages.img").write_bytes(b"pagez" * 1_000)
    with pytest.raises(CheckpointDamagedError):
        believed(store, made, tmp_path / "agents")


@pytest.mark.parametrize("going", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_checksums_are_not_added_to_what_has_taken_its_place(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool, going: bool
) -> None:
    """Nor to what was dropped and is not yet gone: `going`, its files are still there."""
    made, module = unsealed(store), "innkeeper.host.disks.checkpoint_store"

    def slowly(folder: Path) -> dict[str, tuple[int, str]]:
        found = saved_files(folder)
        with monkeypatch.context() as patched:
            if going:
                patched.setattr(f"{module}.shutil.rmtree", lambda *_, **__: None)
            store.drop(made.id)
        if again:
            other = unsealed(store, id=made.id)
            (other.memory_folder / "pages.img").write_bytes(b"other" * 1_000)
        return found

    monkeypatch.setattr(f"{module}.saved_files", slowly)
    assert not store.seal(made.id)
    assert [path.name for path in store.folders()] == [str(made.id)] * again
    left = set((tmp_path / "pool" / "checkpoints").iterdir()) - set(store.folders())
    assert [load(path).memory == made.memory for path in left] == [True] * going
    if again:
        assert believed(store, made, tmp_path / "agents").boot == boot_id()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "id": 7}'])
def test_a_manifest_that_cannot_be_read_keeps_every_image(store: CheckpointStore, text: str) -> None:
    made = publish(store)
    (made.folder / "manifest.json").write_text(text)
    assert store.all() == []
    with pytest.raises(CheckpointNotFoundError):
        store.get(made.id)
    with pytest.raises(UnavailableError):
        store.images()


def test_a_later_field_is_passed_over(store: CheckpointStore) -> None:
    made = publish(store)
    manifest = made.folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "later": 1}))
    assert load(made.folder) == made


@pytest.mark.parametrize("case", ["fits", "driver", "needs", "more needs", "agent", "cut", "changed", "gone", "none"])
def test_memory_is_believed_where_all_of_it_fits(store: CheckpointStore, tmp_path: Path, case: str) -> None:
    made, agents, driver, needs = publish(store), tmp_path / "agents", "gvisor", dict(NEEDS)
    pages = made.memory_folder / "pages.img"
    if case == "driver":
        driver = "qemu"
    elif case == "needs":
        needs["runsc"] = "2"
    elif case == "more needs":
        needs["flags"] = "--new"
    elif case == "agent":
        (agents / AGENT / "inn-agent").unlink()
    elif case == "cut":
        os.truncate(pages, 4_999)
    elif case == "changed":
        pages.write_bytes(b"pages" * 999 + b"other")
    elif case == "gone":
        pages.unlink()
    elif case == "none":
        made = replace(made, memory=None)
    if case == "fits":
        assert made.check_memory(driver=driver, needs=needs, agents=agents) == made.memory
    else:
        with pytest.raises(MemoryUnusableError) as caught:
            made.check_memory(driver=driver, needs=needs, agents=agents)
            made.check_whole()
        # The host's own affairs are not its users'.
        assert str(tmp_path) not in caught.value.message


def test_readers_in_threads_count(store: CheckpointStore) -> None:
    made, entered, leave = publish(store), threading.Event(), threading.Event()

    def read() -> None:
        with store.reading(made.id):
            entered.set()
            leave.wait(20)

    reader = threading.Thread(target=read)
    reader.start()
    assert entered.wait(20)
    with pytest.raises(ConflictError):
        store.drop(made.id)
    leave.set()
    reader.join()
    assert store.drop(made.id)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ('encoding error: gofer.dentry("root/x").beforeSave: deleted and invalidated dentries', "deleted: /root/x"),
        ('encoding error: gofer.dentry("a\\x1b").beforeSave: deleted and invalidated dentries', "that was deleted"),
        ("transport.(*SCMConnectedEndpoint).StateTypeName(0x20540a0?)", "connection to the host's link"),
        ("write /x/pages.img: no space left on device", "disk is full"),
    ],
)
def test_what_runsc_says_is_told_in_words(said: str, reason: str) -> None:
    found = reason_of(f"checkpoint failed: {said}:\ngoroutine 1")
    assert found is not None and reason in found and found.isprintable()


def test_what_runsc_says_otherwise_has_no_reason() -> None:
    assert reason_of("checkpoint failed: something else") is None


def test_the_processor_is_known_by_kind_and_features(tmp_path: Path) -> None:
    def digest(text: str) -> str:
        (tmp_path / "cpuinfo").write_text(text)
        return cpu_digest(tmp_path / "cpuinfo")

    one = "processor : 0\nvendor_id : A\nmodel : 1\nflags : sse avx\ncpu MHz : 1.0\n\nprocessor : 1\n"
    assert digest(one) == digest(one.replace("sse avx", "avx sse").replace("1.0", "2.0"))
    assert len({digest(one), digest(one.replace("avx", "avx2")), digest(one.replace("model : 1", "model : 2"))}) == 3
