"""Half-made things: whose maker lives stays, whose maker was killed is found and goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from innkeeper.host import temporary
from innkeeper.host.disks.image_store import ImageStore
from innkeeper.host.linux.hold import held, is_held

HOLDS = """
import sys
from pathlib import Path
from innkeeper.host.disks.image_store import ImageStore
with ImageStore(Path(sys.argv[1])).workspace() as work:
    (work / "tree").mkdir()
    print(work, flush=True)
    sys.stdin.read()
"""


def example(host: Path, pattern: str) -> Path:
    """Something that the pattern means, and beside it something that it does not."""
    path = host / pattern.replace("/.*.new", "/.x.new").replace("*", "x")
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "kept").touch()
    if pattern == "images/.build-*":
        (path / "tree").mkdir(parents=True)
        (path / "tree" / "file").touch()
    else:
        path.touch()
    return path


@pytest.mark.parametrize("pattern", temporary.TEMPORARY)
def test_what_nobody_makes_any_more_is_found_and_goes(tmp_path: Path, pattern: str) -> None:
    path = example(tmp_path, pattern)
    with held(path):
        assert is_held(path)
        assert temporary.abandoned(tmp_path) == []
    assert temporary.abandoned(tmp_path) == [path]
    temporary.remove(path)
    temporary.remove(path)
    assert [one.name for one in path.parent.iterdir()] == ["kept"]


def test_the_workspace_of_another_process_is_held_until_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        work = Path(other.stdout.readline().strip())
        with ImageStore(tmp_path).workspace():
            assert temporary.abandoned(tmp_path) == []
        other.kill()
        other.wait()
        assert temporary.abandoned(tmp_path) == [work]
        temporary.remove(work)
        assert not work.exists()


def test_one_that_is_taken_for_abandoned_while_it_begins_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from innkeeper.host.linux import hold

    flock, swept = hold.fcntl.flock, []

    def swept_before(descriptor: int, operation: int) -> None:
        if not swept:
            swept.extend(tmp_path.glob("images/.build-*"))
            temporary.remove(swept[0])
        flock(descriptor, operation)

    monkeypatch.setattr(hold.fcntl, "flock", swept_before)
    with ImageStore(tmp_path).workspace() as work:
        assert work.is_dir() and [work] != swept
    assert not is_held(work) and not work.exists()


def test_what_a_guest_or_nobody_has_is_not_held(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert not is_held(tmp_path / "link")
    assert not is_held(tmp_path / "gone")
    with pytest.raises(FileNotFoundError), held(tmp_path / "gone"):
        raise AssertionError
