"""Changes that a guest tells of itself: what is asked of its agent, when it is not asked, and what of its answers is believed. The agent follows a script."""

import asyncio
import contextlib
import struct
from types import SimpleNamespace
from uuid import uuid4

import pytest

from innkeeper.errors import ConflictError, FileMissingError, GuestError, LinkLostError
from innkeeper.host import change_result, guest_changes
from innkeeper.host.change_scanner import ChangeScanError
from innkeeper.host.file_changes import FileChanges
from innkeeper.host.guest_link import GuestInputError
from innkeeper.wire.stream import Data, End, Message

pytestmark = pytest.mark.anyio
CREATED, MODIFIED, DELETED = 1, 2, 3
FILE, SYMLINK = 1, 2
PNG = (CREATED, FILE, 70, b"/home/user/a.png")


def result(rows, *, total=None, index=None, index_at=None, magic=b"INNCHNG1", tail=b""):
    """A result as a scanner writes it, or nearly so."""
    body, offsets = b"", []
    for number, (status, kind, size, path) in enumerate(rows):
        if number % 1000 == 0:
            offsets.append(32 + len(body))
        body += struct.pack("<BBHQ", status, kind, len(path), size) + path
    offsets = offsets if index is None else index
    head = struct.pack("<8sQQQ", magic, len(rows) if total is None else total, index_at or 32 + len(body), 7)
    return head + body + struct.pack(f"<{len(offsets)}Q", *offsets) + tail


class Answer:
    """A stream with what the agent says: events, then its result, or an error in their place."""

    def __init__(self, *events, answer):
        self.events, self.answer = [Data(event) if isinstance(event, bytes) else event for event in events], answer

    async def next_event(self):
        if self.events:
            return self.events.pop(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is None:
            await asyncio.get_running_loop().create_future()
        return None

    async def result(self):
        return self.answer

    def cancel(self):
        pass


class Machine:
    """A machine of a driver whose guests' files the host does not see."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        self.id, self.upper, self.has_baseline, self.scan_lock = "0123", None, False, asyncio.Lock()
        self.record = SimpleNamespace(instance_id=uuid4())
        self.volumes = {"one": SimpleNamespace(path="/srv/data")}
        self.driver = SimpleNamespace(name="qemu", capabilities=SimpleNamespace(host_sees_changes=False))
        self.endpoint = self

    async def open(self, verb, params, timeout_seconds):
        self.asked.append({"verb": verb, **params})
        return self.answers.pop(0)

    async def request(self, verb, params, timeout_seconds):
        assert verb == "mime"
        return {"types": ["text/plain"] * len(params["paths_b64"])}

    @contextlib.asynccontextmanager
    async def in_use(self):
        yield


def listing(rows, **more):
    return Answer(result(rows), answer={"total": len(rows), "scanned": 9, "duration_us": 5, **more})


def nothing(**more):
    return Answer(answer={"total": 0, "scanned": 9, "duration_us": 5, **more})


def changes_in(tmp_path, machine, monkeypatch):
    monkeypatch.setattr("os.chown", lambda *_: None)
    (tmp_path / "changes").mkdir(exist_ok=True)
    (tmp_path / "records" / str(machine.record.instance_id)).mkdir(parents=True, exist_ok=True)
    scanner = SimpleNamespace(saved=0)
    made = FileChanges(scanner, tmp_path / "changes", records=tmp_path / "records", scanner_uid=0, scanner_gid=0)
    made.prepare(machine, machine.record.instance_id)
    return made


def left(changes, machine):
    return sorted(path.name for path in changes.folder(machine.record.instance_id).iterdir())


async def test_what_a_guest_lists_is_reported_kept_and_public(tmp_path, monkeypatch):
    rows = [
        PNG,
        (DELETED, FILE, 0, b"/etc/issue"),
        (MODIFIED, SYMLINK, 3, b"/home/user/..link"),
        (CREATED, FILE, 5, b"/x"),
    ]
    machine = Machine(Answer(answer={"scanned": 4}), listing(rows))
    changes, execution = changes_in(tmp_path, machine, monkeypatch), uuid4()
    await changes.ensure_baseline(machine)
    report = await changes.after_command(machine, execution)
    assert [(row["path"], row["status"], row["mime_type"]) for row in report["files_changed"]] == [
        ("/home/user/a.png", "created", "image/png"),
        ("/etc/issue", "deleted", None),
        ("/home/user/..link", "modified", "inode/symlink"),
        ("/x", "created", "text/plain"),
    ]
    assert (report["files_changed_total"], report["files_changed_truncated"]) == (4, False)
    asked = [(one["op"], one.get("id")) for one in machine.asked]
    assert asked == [("baseline", None), ("changes", str(execution))]
    assert {"/proc", "/srv/data"} <= set(machine.asked[1]["excluded"])
    page = await changes.page(machine, machine.record.instance_id, execution, cursor=1, limit=2)
    assert ([row["path"] for row in page["files_changed"]], page["total"]) == (["/etc/issue", "/home/user/..link"], 4)
    assert await changes.was_reported(machine.record.instance_id, b"/home/user/a.png")
    assert not await changes.was_reported(machine.record.instance_id, b"/home/user/b.png")


async def test_a_list_that_is_longer_than_an_answer_comes_in_pages_and_is_public_as_a_whole(tmp_path, monkeypatch):
    rows = [(CREATED, FILE, number, b"/m/%05d.txt" % number) for number in range(2500)]
    machine = Machine(listing(rows))
    changes, execution = changes_in(tmp_path, machine, monkeypatch), uuid4()
    report = await changes.after_command(machine, execution)
    assert (len(report["files_changed"]), report["files_changed_total"], report["files_changed_truncated"]) == (
        1000,
        2500,
        True,
    )
    page = await changes.page(machine, machine.record.instance_id, execution, cursor=1999, limit=1000)
    assert [row["size"] for row in page["files_changed"]] == list(range(1999, 2500))
    assert await changes.was_reported(machine.record.instance_id, b"/m/02499.txt")


async def test_a_baseline_is_the_instances_and_outlives_the_daemon(tmp_path, monkeypatch):
    machine = Machine(Answer(answer={}), Answer(answer={}))
    changes = changes_in(tmp_path, machine, monkeypatch)
    await changes.ensure_baseline(machine)
    machine.has_baseline = False
    await changes_in(tmp_path, machine, monkeypatch).ensure_baseline(machine)
    assert len(machine.asked) == 1
    # Written to since, by its configuration; or a clone, whose disk has the baseline of another guest.
    changes.forget_baseline(machine)
    await changes.ensure_baseline(machine)
    clone = Machine(Answer(answer={}))
    await changes_in(tmp_path, clone, monkeypatch).ensure_baseline(clone)
    assert [len(machine.asked), len(clone.asked)] == [2, 1]


async def test_a_guest_that_wrote_nothing_since_the_last_scan_is_not_asked(tmp_path, monkeypatch):
    machine = Machine(Answer(answer={"writes": 4}), nothing(writes=9), nothing(), nothing(writes=True))
    changes = changes_in(tmp_path, machine, monkeypatch)
    await changes.ensure_baseline(machine)
    for writes, asked in ((4, 1), (9, 2), (9, 2), (10, 3), (9, 4)):
        report = await changes.after_command(machine, uuid4(), writes=writes)
        assert report["files_changed_total"] == 0
        assert len(machine.asked) == asked
    # As good as true, to Python; but the guest has said nothing that can be compared.
    machine.answers.append(nothing())
    await changes.after_command(machine, uuid4(), writes=1)
    assert len(machine.asked) == 5
    assert changes.scans_saved == 2
    machine.answers.append(nothing(writes=9))
    await changes.after_command(machine, uuid4(), writes=9)
    changes.release(machine)
    machine.answers.append(nothing(writes=9))
    await changes.after_command(machine, uuid4(), writes=9)
    assert len(machine.asked) == 7


async def test_a_link_that_breaks_costs_no_report(tmp_path, monkeypatch):
    whole = result([PNG])
    machine = Machine(Answer(whole[:40], answer=LinkLostError()), Answer(whole[:9], whole[9:], answer={"total": 1}))
    changes, execution = changes_in(tmp_path, machine, monkeypatch), uuid4()
    report = await changes.after_command(machine, execution)
    assert report["files_changed_total"] == 1
    assert [one["id"] for one in machine.asked] == [str(execution)] * 2
    assert left(changes, machine) == [f"{execution}.changes"]


LIES = {
    "another magic": result([PNG], magic=b"INNCHNG2"),
    "no header": b"INN",
    "fewer rows than it says": result([PNG], total=2),
    "more rows than it says": result([PNG, PNG], total=1),
    "none": result([], total=0),
    "rows without end": result([PNG], total=1 << 62),
    "no status": result([(9, FILE, 1, b"/a")]),
    "no kind": result([(CREATED, 7, 1, b"/a")]),
    "a size beyond all": result([(CREATED, FILE, 1 << 63, b"/a")]),
    "a relative path": result([(CREATED, FILE, 1, b"a")]),
    "an empty path": result([(CREATED, FILE, 1, b"")]),
    "a NUL": result([(CREATED, FILE, 1, b"/a\0b")]),
    "the way up": result([(CREATED, FILE, 1, b"/a/../proc/1/environ")]),
    "the way up at the end": result([(CREATED, FILE, 1, b"/a/..")]),
    "a point": result([(CREATED, FILE, 1, b"/./proc/1/environ")]),
    "an empty name": result([(CREATED, FILE, 1, b"//proc/1/environ")]),
    "a path that is too long": result([(CREATED, FILE, 1, b"/" + b"x" * 4095)]),
    "an index into a row": result([PNG], index=[40]),
    "an index to nowhere": result([PNG], index=[1 << 63]),
    "an index elsewhere": result([PNG], index_at=33),
    "no index": result([PNG], index=[]),
    "more than that": result([PNG], tail=b"x"),
    "nothing, of one": b"",
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_costs_the_report_and_leaves_nothing(tmp_path, monkeypatch, lie):
    said = [LIES[lie]] if LIES[lie] else []
    machine = Machine(Answer(*said, answer={"total": 1}), listing([PNG]))
    changes, execution = changes_in(tmp_path, machine, monkeypatch), uuid4()
    with pytest.raises(ChangeScanError) as raised:
        await changes.after_command(machine, execution)
    assert raised.value.code == "io_error"
    assert left(changes, machine) == []
    page = await changes.page(machine, machine.record.instance_id, execution, cursor=0, limit=10)
    assert page == {"files_changed": [], "total": 0, "next_cursor": None}
    # The next command's is as good as ever.
    assert (await changes.after_command(machine, uuid4()))["files_changed_total"] == 1


@pytest.mark.parametrize("total", [0, 2, None, True, -1, "1", 1.0, 1 << 70])
async def test_a_total_that_is_not_that_of_the_rows_is_a_lie(tmp_path, monkeypatch, total):
    machine = Machine(Answer(result([PNG]), answer={"total": total}))
    changes = changes_in(tmp_path, machine, monkeypatch)
    with pytest.raises(ChangeScanError):
        await changes.after_command(machine, uuid4())
    assert left(changes, machine) == []


async def test_a_guest_cannot_fill_the_hosts_disk_or_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(guest_changes, "MAX_RESULT_BYTES", 1_000)
    monkeypatch.setattr(change_result, "MAX_LISTED", 3)
    machine = Machine(Answer(*[bytes(400)] * 3, answer=None), listing([PNG] * 4), listing([PNG] * 3))
    changes = changes_in(tmp_path, machine, monkeypatch)
    for code in ("too_large", "io_error"):
        with pytest.raises(ChangeScanError) as raised:
            await changes.after_command(machine, uuid4())
        assert raised.value.code == code
        assert left(changes, machine) == []
    assert (await changes.after_command(machine, uuid4()))["files_changed_total"] == 3


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (FileMissingError(), "no_baseline"),
        (ConflictError(), "no_space"),
        (GuestInputError("x", guest_code="too_large"), "too_large"),
        (GuestError("x", guest_code="io_error"), "io_error"),
    ],
)
async def test_what_goes_wrong_in_the_guest_costs_the_report_alone(tmp_path, monkeypatch, said, code):
    machine = Machine(Answer(answer=said))
    with pytest.raises(ChangeScanError) as raised:
        await changes_in(tmp_path, machine, monkeypatch).after_command(machine, uuid4())
    assert raised.value.code == code


@pytest.mark.parametrize("said", [Message({"total": 1}), End()])
async def test_what_nobody_asked_for_is_an_error(tmp_path, monkeypatch, said):
    machine = Machine(Answer(said, answer={"total": 0}), Answer(b"rows", answer={}))
    changes = changes_in(tmp_path, machine, monkeypatch)
    with pytest.raises(ChangeScanError):
        await changes.after_command(machine, uuid4())
    with pytest.raises(ChangeScanError):
        await changes.ensure_baseline(machine)
    assert left(changes, machine) == []


async def test_a_guest_that_never_answers_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(guest_changes, "DEADLINE_SECONDS", 0.05)
    machine = Machine(Answer(answer=None))
    with pytest.raises(ChangeScanError) as raised:
        await changes_in(tmp_path, machine, monkeypatch).after_command(machine, uuid4())
    assert raised.value.code == "timeout"


async def test_nothing_is_written_through_a_link_in_the_scanners_folder(tmp_path, monkeypatch):
    machine = Machine(Answer(answer={}), listing([PNG]))
    changes = changes_in(tmp_path, machine, monkeypatch)
    folder, elsewhere = changes.folder(machine.record.instance_id), tmp_path / "elsewhere"
    elsewhere.write_text("untouched")
    for name in ("incoming", "baseline"):
        (folder / name).symlink_to(tmp_path / ("elsewhere" if name == "incoming" else "nowhere"))
    await changes.ensure_baseline(machine)
    await changes.after_command(machine, uuid4())
    assert elsewhere.read_text() == "untouched"
    assert not (tmp_path / "nowhere").exists()
