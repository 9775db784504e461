"""Admission, guest paths, media types, folders, leaks."""

import base64
import json
from types import SimpleNamespace
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.core.host_verbs import path_to_wire
from innkeeper.errors import InstanceFailedError, InvalidRequestError, NoHostError
from innkeeper.host import admission
from innkeeper.host.admission import MIB, Admission, Load, committed_mb, free_bytes
from innkeeper.host.directories import INSTANCE_RECORD, Directories
from innkeeper.host.file_changes import FileChanges, mime_by_name
from innkeeper.host.wire_paths import PATH_MAX, guest_path, guest_path_params, name_from_entry, path_param


def test_frozen_guests_count_a_quarter():
    assert committed_mb([Load(400, True), Load(100, False)]) == 200
    assert committed_mb([]) == 0


@pytest.mark.parametrize(
    ("wanted", "free", "fits"), [(600, 10, True), (601, 10, False), (1, 9, False), (600, 11, True)]
)
def test_what_fits_and_what_does_not(monkeypatch, wanted, free, fits):
    monkeypatch.setattr(admission, "total_memory_mb", lambda: 500)
    rules = Admission(
        memory_overcommit=2.0,
        memory_reserve_mb=100,
        disk_reserve_mb=10,
        disk_free_bytes=lambda: free * MIB,
        disk_free_files=lambda: 1_000,
    )
    assert rules.memory_limit_mb() == 800
    if fits:
        rules.check(wanted, [Load(100, False), Load(400, True)])
    else:
        with pytest.raises(NoHostError):
            rules.check(wanted, [Load(100, False), Load(400, True)])


def test_the_host_has_memory_and_disk(tmp_path):
    assert admission.total_memory_mb() > 64
    assert free_bytes(tmp_path) > 0


@given(st.binary(max_size=40).filter(lambda path: b"\0" not in path))
def test_paths_survive_the_wire_and_reach_the_agent(path):
    path = b"/" + path
    assert guest_path(path_to_wire(path)) == path
    (name, value), *more = path_param(path).items()
    assert not more
    assert (value.encode() if name == "path" else base64.b64decode(value)) == path
    assert (name == "path_b64") != _is_text(path)
    assert guest_path_params([path]) == {"paths_b64": [base64.b64encode(path).decode()]}


def _is_text(path):
    try:
        path.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    "text", ["", "x", "./x", "/a\0b", "/" + "x" * PATH_MAX, "b64:!", "b64:eA==", "b64:é", "/a\ud800", "b64:LwA="]
)
def test_bad_paths(text):
    with pytest.raises(InvalidRequestError):
        guest_path(text)


def test_the_longest_path():
    assert len(guest_path("/" + "x" * (PATH_MAX - 1))) == PATH_MAX


@given(
    st.binary(min_size=1, max_size=255).filter(lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b".."))
)
def test_names_come_as_the_agent_spells_them(name):
    entry = {"name": name.decode()} if _is_text(name) else {"name_b64": base64.b64encode(name).decode()}
    assert name_from_entry(entry) == path_to_wire(name)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"name": 1},
        {"name": ""},
        {"name": "."},
        {"name": ".."},
        {"name": "../x"},
        {"name": "a/b"},
        {"name": "a\0"},
        {"name": "x" * 256},
        {"name": "\ud800"},
        {"name_b64": "!"},
        {"name_b64": "Li4="},
        {"name_b64": 7},
    ],
)
def test_names_that_an_agent_must_not_send(entry):
    with pytest.raises(ValueError):
        name_from_entry(entry)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (b"/tmp/chart.png", "image/png"),
        (b"/a/B.PNG", "image/png"),
        (b"/a/x.py", "text/x-python"),
        (b"/a/x.md", "text/markdown"),
        (b"/a/n.ipynb", "application/x-ipynb+json"),
        (b"/a/x.tar.gz", "application/gzip"),
        (b"/a/x.xz", "application/x-xz"),
        (b"/a/x.br", None),
        (b"/a.png/x", None),
        (b"/a/data:,x.png", "image/png"),
        (b"/a/http:x.png", "image/png"),
        (b"/a/\xff.json", "application/json"),
        (b"/a/x.log", "text/plain"),
        (b"/a/Makefile", None),
        (b"", None),
    ],
)
def test_types_by_name(path, kind):
    assert mime_by_name(path) == kind


async def _remember(changes, instance_id, paths):
    rows = [SimpleNamespace(path=path) for path in paths]
    await changes._remember(instance_id, None, rows, len(rows))


@pytest.mark.anyio
async def test_reported_paths_are_remembered_once(tmp_path):
    changes, instance_id = FileChanges(None, tmp_path / "none", records=tmp_path, scanner_uid=0, scanner_gid=0), uuid4()
    (tmp_path / str(instance_id)).mkdir()
    assert not await changes.was_reported(instance_id, b"/a")
    await _remember(changes, instance_id, [b"/a", b"/\xff"])
    await _remember(changes, instance_id, [b"/a"])
    assert await changes.was_reported(instance_id, b"/a")
    assert await changes.was_reported(instance_id, b"/\xff")
    assert not await changes.was_reported(instance_id, b"/A")
    assert not await changes.was_reported(uuid4(), b"/a")
    assert (tmp_path / str(instance_id) / "reported").stat().st_size == 32


def test_folders_and_their_records(tmp_path):
    directories, instance_id = Directories(tmp_path / "host"), uuid4()
    directories.make()
    directories.make()
    assert {path.stat().st_mode & 0o777 for path in (directories.machines, directories.trash)} == {0o700}
    assert directories.disk_of(instance_id) is None
    record = directories.instances / str(instance_id) / INSTANCE_RECORD
    record.parent.mkdir()
    record.write_text(json.dumps({"disk": "d", "hostname": "h"}))
    assert (directories.disk_of(instance_id), directories.hostname_of(instance_id)) == ("d", "h")
    for damaged in ("", "{", "[]", "{}", "7"):
        record.write_text(damaged)
        # Not the same as no record: its disk is somebody's.
        with pytest.raises(InstanceFailedError):
            directories.disk_of(instance_id)
