"""Old executions go, of every instance; running and younger ones stay."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest

from innkeeper.host import retention
from innkeeper.host.executions import Executions
from innkeeper.host.metrics import HostMetrics
from innkeeper.host.turns import Turns

pytestmark = pytest.mark.anyio
DAY = 86_400


class Fleet:
    """Instances by their folders, as the fleet tells of them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.running: dict[UUID, set[str]] = {}

    def disks(self) -> list[UUID]:
        return [UUID(entry.name) for entry in (self.home / "instances").iterdir()]

    def journals(self, instance_id: UUID) -> Path:
        return self.home / "instances" / str(instance_id) / "journals"

    def machines(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(record=SimpleNamespace(instance_id=instance), journals=names)
            for instance, names in self.running.items()
        ]


def leave(fleet: Fleet, instance: UUID, name: str, *, days_ago: float) -> list[Path]:
    changes = fleet.home / "changes" / str(instance)
    for folder in (fleet.journals(instance), changes):
        folder.mkdir(parents=True, exist_ok=True)
    files = [fleet.journals(instance) / f"{name}{suffix}" for suffix in (".json", ".head")]
    files.append(changes / f"{name}.changes")
    for file in files:
        file.write_text("x")
        os.utime(file, (0, time.time() - days_ago * DAY))
    return files


async def test_old_executions_go(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    changes = SimpleNamespace(folder=lambda instance: tmp_path / "changes" / str(instance))
    executions = Executions(changes=changes, turns=Turns(1), metrics=HostMetrics())  # type: ignore[arg-type]
    first, second = uuid4(), uuid4()
    old = [*leave(fleet, first, "old", days_ago=31), *leave(fleet, second, "old", days_ago=400)]
    kept = [*leave(fleet, first, "young", days_ago=29), *leave(fleet, first, "running", days_ago=31)]
    fleet.running[first] = {"running"}
    beside = [tmp_path / "changes" / str(first) / "baseline", tmp_path / "instances" / str(first) / "reported"]
    for file in beside:
        file.write_text("x")
        os.utime(file, (0, 0))
    before = time.time() - 30 * DAY
    assert await retention.forget(fleet, executions, older_than=before) == 2  # type: ignore[arg-type]
    assert [path for path in old if path.exists()] == []
    assert [path for path in (*kept, *beside) if not path.exists()] == []
    assert await retention.forget(fleet, executions, older_than=before) == 0  # type: ignore[arg-type]
