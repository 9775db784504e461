"""A daemon that is killed at any step of keeping a build's step, exporting an image or importing one leaves nothing, and the next one makes it."""

# ruff: noqa: ASYNC240  # a test has nobody to keep waiting

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from server_fixture import all_pids, command_line
from tests import leaks
from tests.faults import census, dying_daemon
from tests.faults.dying_daemon import DIED, EXPORT, IMPORT, KEY, OTHER, SAVE, archive, export, save
from tests.integration import oci_fixture as oci
from tests.integration.daemon_fixture import NEEDS_RUNSC, REPOSITORY, Host, built_agent, eventually, running_host

from innkeeper.core import build_verbs
from innkeeper.core import host_verbs as verbs
from innkeeper.host import temporary
from innkeeper.host.disks import image_export
from innkeeper.host.disks.image_build import LET_GO_SCRIPT
from innkeeper.host.garbage import STALE_SECONDS

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

NEEDS_TOOLS = pytest.mark.skipif(oci.NEEDS_TOOLS, reason="needs skopeo and umoci")
QUICK = ("mkfs.erofs runs", "the copy has its name", "umoci unpacks")


@pytest.fixture(scope="module")
async def home(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """A state directory with a kept step."""
    directory = tmp_path_factory.mktemp("home")
    async with running_host(directory) as host:
        await save(host, KEY)
    yield directory
    assert leaks.wait_for_none(directory) == []


def steps(*tables: dict[str, object]) -> list[object]:
    return [
        pytest.param(step, id=step.replace(" ", "-"), marks=[] if step in QUICK else pytest.mark.long)
        for table in tables
        for step in table
    ]


async def die(home: Path, step: str) -> None:
    """Have a daemon die at the step; afterwards none of its programs is left."""
    argv = [sys.executable, "-m", "tests.faults.dying_daemon", str(home), str(built_agent()), step]
    done = await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=dict(os.environ)
    )
    assert done.returncode == DIED, done.stderr[-3000:]
    mark = os.fsencode(home) + b"/"
    # A guest outlives its daemon; whatever makes an image does not.
    await eventually(
        lambda: not [pid for pid in all_pids() if mark in (line := command_line(pid)) and line[:5] != b"runsc"]
    )


@asynccontextmanager
async def nothing_left(home: Path) -> AsyncIterator[Host]:
    """The next daemon, on whose host there is nothing of the image that was being made."""
    async with running_host(home) as host:
        for instance in host.daemon.fleet.disks():
            # It waits for whoever owns its row to say that there is none.
            await host.destroy(instance)
        assert temporary.abandoned(host.settings.host_dir) == []
        assert await asyncio.to_thread(census.wait_for_none, home, instances=()) == []
        assert (await host.status())["leaked"] == 0
        assert not (await host.request(verbs.ListMachines()))["machines"]
        yield host
        assert await asyncio.to_thread(census.wait_for_none, home, instances=()) == []
        # Whatever was made has no name in a database here: all of it can go, but for what kept steps stand on.
        empty = await export(host, build_verbs.ScratchImage())
        await host.request(verbs.CollectImages((empty,)))
        images = host.settings.host_dir / "images"
        assert {path.stem for path in images.glob("*.erofs")} == {host.image.digest, empty}
        assert {path.stem for path in images.glob("*.kept")} == {empty}


@pytest.mark.parametrize("step", steps(EXPORT))
async def test_a_daemon_that_dies_at_a_step_of_an_export(home: Path, step: str) -> None:
    await die(home, step)
    async with nothing_left(home) as host:
        await export(host)


@pytest.mark.parametrize("step", steps(SAVE))
async def test_a_daemon_that_dies_while_a_step_is_kept(home: Path, step: str) -> None:
    await die(home, step)
    async with nothing_left(home) as host:
        # It was told to nobody, and the one that was kept before is there.
        assert await host.request(build_verbs.FindSteps((KEY, OTHER))) == {"found": [KEY]}
        await save(host, OTHER)
        assert await host.request(build_verbs.FindSteps((KEY, OTHER))) == {"found": [KEY, OTHER]}
        folder = host.settings.host_dir / "pool" / "steps"
        for path in folder.glob(f"{OTHER}.*"):
            path.unlink()


@NEEDS_TOOLS
@pytest.mark.parametrize("step", steps(IMPORT))
async def test_a_daemon_that_dies_at_a_step_of_an_import(home: Path, step: str) -> None:
    await die(home, step)
    async with nothing_left(home) as host:
        made = await oci.import_archive(host, archive())
        assert made.steps[-1] == "compressing"


@pytest.fixture
def paused(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path | None]:
    """Exports wait with everything mounted; the folder of the one that does, once it does."""
    monkeypatch.setattr(image_export, "SCRIPT", image_export.SCRIPT)
    dying_daemon.pause_in_script(home)

    def folder() -> Path | None:
        found = next((home / "host" / "images").glob(".build-*/paused"), None)
        return found.parent if found else None

    return folder


def image_of_step(home: Path) -> str:
    """The digest of the image that the kept step stands on."""
    record = home / "host" / "pool" / "steps" / f"{KEY}.json"
    return str(json.loads(record.read_text())["image_digest"])


async def test_nobody_takes_from_an_export_what_it_works_with(
    home: Path, paused: Callable[[], Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the search for leaks, nor the collection of garbage, however old its files seem, nor that of kept steps and images."""
    async with running_host(home) as host:
        exporting = asyncio.create_task(export(host))
        try:
            work = await eventually(lambda: paused() or exporting.done(), seconds=120)
            assert isinstance(work, Path), await exporting
            await take_what_can_be_taken(host, home, work)
            (work / "go").touch()
            digest = await exporting
        finally:
            exporting.cancel()
            await asyncio.wait({exporting})
            monkeypatch.undo()
        # The step is gone, the image that was made of its copy is whole.
        assert (await host.request(build_verbs.FindSteps((KEY,))))["found"] == []
        guest = await host.ensure(bare=True, user="root", shape=host.shape(image_digest=digest))
        assert (await host.read(guest, "/srv/noise"))[0]["size"] == dying_daemon.BYTES
        await host.destroy(guest)
        await save(host, KEY)


async def take_what_can_be_taken(host: Host, home: Path, work: Path) -> None:
    base, empty = host.settings.host_dir, image_of_step(home)
    dead = base / "images" / ".build-dead"
    dead.mkdir()
    old = time.time() - 2 * STALE_SECONDS
    for one in (dead, *base.glob("pool/steps/.copy-*"), *work.iterdir(), work):
        os.utime(one, (old, old), follow_symlinks=False)
    assert temporary.abandoned(base) == [dead]
    leaked = (await host.status())["leaks"]
    assert [(leak["kind"], leak["name"]) for leak in leaked] == [("temporary_file", str(dead))]
    removed = (await host.request(verbs.CollectGarbage(True, (empty,))))["items"]
    assert [(one["kind"], one["name"]) for one in removed] == [("temporary", "images/.build-dead")]
    assert (await host.request(build_verbs.CollectSteps(everything=True)))["removed"] == 1
    await host.request(verbs.CollectImages((empty,)))
    assert (await host.status())["leaked"] == 0


async def test_a_guest_on_a_step_goes_on_when_that_is_collected(home: Path) -> None:
    async with running_host(home) as host:
        shape = host.shape(image_digest=image_of_step(home))
        guest = await host.ensure(bare=True, user="root", step_key=KEY, shape=shape)
        assert (await host.request(build_verbs.CollectSteps(everything=True)))["removed"] == 1
        assert (await host.read(guest, "/srv/noise"))[0]["size"] == dying_daemon.BYTES
        await host.request(build_verbs.SaveStep(guest, KEY))
        assert (await host.request(build_verbs.FindSteps((KEY,))))["found"] == [KEY]
        await host.destroy(guest)
        assert await asyncio.to_thread(census.wait_for_none, home, instances=()) == []


LETS_GO = """
set -e
mkdir -p {base}/below/a {base}/below/b {base}/beside
for one in below/a below/b beside; do mount -t tmpfs none {base}/$one; done
export PATH={shims}:$PATH
exec bash {script} {base}/below sh -c 'cat /proc/self/mountinfo'
"""
# A mount that goes from the host at the very moment, and one that cannot be let go of.
GOES = '#!/bin/sh\n/bin/umount "$@"; /bin/umount "$@"\n'
STAYS = "#!/bin/sh\nexit 32\n"


@pytest.mark.parametrize(("umount", "status"), [(None, 0), (GOES, 0), (STAYS, 1)], ids=["plain", "goes", "stays"])
def test_who_makes_an_image_lets_go_of_guests_disks(tmp_path: Path, umount: str | None, status: int) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    if umount is not None:
        (shims / "umount").write_text(umount.replace("/bin/umount", shutil.which("umount") or "umount"))
        (shims / "umount").chmod(0o755)
    program = LETS_GO.format(base=tmp_path / "base", shims=shims, script=LET_GO_SCRIPT)
    argv = ["unshare", "--mount", "--propagation", "private", "bash", "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr == f"cannot let go of {tmp_path}/base/below/b\n"
    else:
        assert f"{tmp_path}/base/below" not in done.stdout and f"{tmp_path}/base/beside" in done.stdout
