"""Records on disk as earlier versions wrote them. These texts stay as they are: what was written once has to be read for ever."""

import json
from pathlib import Path
from uuid import UUID

import pytest

from innkeeper.errors import InstanceFailedError
from innkeeper.host.directories import INSTANCE_FORMAT, Directories
from innkeeper.host.journal import read_record, unfinished
from innkeeper.host.machine import FORMAT, MachineRecord, load_machine_record

INSTANCE = UUID("0193c1de-0000-7000-8000-000000000001")
EXECUTION = UUID("0193c1de-0000-7000-8000-000000000002")
SHAPE_1 = (
    '{"pool_key": "k", "image_digest": "d", "driver": "gvisor", "vcpu_count": 2, "memory_mb": 512, "disk_mb": 2048, '
    '"egress_mode": "internet", "user": "user"}'
)
# The first release had no format number.
MACHINES = {
    "without a format": f'{{"machine_id": "m", "shape": {SHAPE_1}, "driver": "gvisor", "disk": "k", "slot_index": 3, "hostname": "h"}}',
    "1": f'{{"format": 1, "machine_id": "m", "shape": {SHAPE_1}, "driver": "gvisor", "disk": "k", "slot_index": 3, "hostname": "h"}}',
}
INSTANCES = {
    "without a format": '{"disk": "k", "hostname": "h", "image_digest": "d"}',
    "1": '{"format": 1, "disk": "k", "hostname": "h", "image_digest": "d"}',
}
EXECUTION_1 = (
    f'{{"execution_id": "{EXECUTION}", "started_at": 1.5, "total_bytes": 3, "ended": true, "exit_code": 7, "signal": null, '
    '"timed_out": false, "duration_ms": 2.5, "lost": null}'
)


def test_every_format_has_its_text_here() -> None:
    assert set(MACHINES) == {"without a format", *(str(number) for number in range(1, FORMAT + 1))}
    assert set(INSTANCES) == {"without a format", *(str(number) for number in range(1, INSTANCE_FORMAT + 1))}


@pytest.mark.parametrize("text", MACHINES.values(), ids=MACHINES.keys())
def test_machines(tmp_path: Path, text: str) -> None:
    (tmp_path / "machine.json").write_text(text)
    (tmp_path / "claim.json").write_text(f'{{"instance_id": "{INSTANCE}"}}')
    (tmp_path / "configured").touch()
    record = load_machine_record(tmp_path)
    assert record is not None
    assert (record.machine_id, record.disk, record.slot_index, record.hostname) == ("m", "k", 3, "h")
    assert (record.shape.memory_mb, record.shape.user, record.instance_id, record.configured) == (
        512,
        "user",
        INSTANCE,
        True,
    )


@pytest.mark.parametrize("text", INSTANCES.values(), ids=INSTANCES.keys())
def test_instances(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "instances" / str(INSTANCE)
    folder.mkdir(parents=True)
    (folder / "instance.json").write_text(text)
    directories = Directories(tmp_path)
    assert directories.disk_of(INSTANCE) == "k"
    assert directories.hostname_of(INSTANCE) == "h"
    assert directories.image_of(INSTANCE) == "d"


def test_executions(tmp_path: Path) -> None:
    (tmp_path / f"{EXECUTION}.json").write_text(EXECUTION_1)
    record = read_record(tmp_path, EXECUTION)
    assert (record.exit_code, record.total_bytes, record.ended, record.duration_ms) == (7, 3, True, 2.5)
    other = UUID(int=EXECUTION.int + 1)
    (tmp_path / f"{other}.running").write_bytes(b"1732233445.123456" + b" " + b"0" * 20 + b"\n")
    assert unfinished(tmp_path) == [other]
    assert read_record(tmp_path, other).started_at == 1732233445.123456


def test_what_a_newer_version_added_is_passed_over(tmp_path: Path) -> None:
    body = json.loads(MACHINES["1"])
    (tmp_path / "machine.json").write_text(json.dumps({**body, "new": 1, "shape": {**body["shape"], "new": 2}}))
    assert load_machine_record(tmp_path) is not None
    (tmp_path / f"{EXECUTION}.json").write_text(json.dumps({**json.loads(EXECUTION_1), "new": 1}))
    assert read_record(tmp_path, EXECUTION).exit_code == 7


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    body = json.loads(MACHINES["1"])
    (tmp_path / "machine.json").write_text(json.dumps({**body, "format": FORMAT + 1}))
    assert load_machine_record(tmp_path) is None
    folder = tmp_path / "instances" / str(INSTANCE)
    folder.mkdir(parents=True)
    (folder / "instance.json").write_text(json.dumps({"format": INSTANCE_FORMAT + 1, "disk": "k"}))
    # Not None: nobody's disk would be removed.
    with pytest.raises(InstanceFailedError, match="newer version"):
        Directories(tmp_path).disk_of(INSTANCE)


def test_what_is_written_now_is_the_newest_format(tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text(MACHINES["without a format"])
    record = load_machine_record(tmp_path)
    assert isinstance(record, MachineRecord)
    record.save(tmp_path)
    written = json.loads((tmp_path / "machine.json").read_text())
    # Fields that came later, each with a default.
    assert (written.pop("agent"), written.pop("memory_needs")) == ("", {})
    assert [written["shape"].pop(name) for name in ("egress_ports", "egress_cidrs")] == [[], []]
    assert written == json.loads(MACHINES[str(FORMAT)])
