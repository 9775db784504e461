"""A daemon that makes an image and is killed at a step of it: `python -m tests.faults.dying_daemon HOME AGENT STEP`, in a process of its own.

It ends with status 9 where it died as asked; anything else it says on stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("acceptance", "integration")]
from server_fixture import children  # noqa: E402
from tests.integration import oci_fixture as oci  # noqa: E402
from tests.integration.daemon_fixture import Host, running_host  # noqa: E402

from innkeeper.core import build_verbs  # noqa: E402
from innkeeper.core.host_verbs import ImportImage, to_wire  # noqa: E402
from innkeeper.host.disks import image_export, oci_job, step_cache  # noqa: E402
from innkeeper.host.disks.image_store import ImageStore  # noqa: E402

DIED = 9
KEY, OTHER = "a" * 64, "b" * 64
EXPORT_IT = build_verbs.ExportStep(KEY)
# Enough that each program is at it for a while.
BYTES, FILES = 24 << 20, 3_000
BEFORE_COUNTING = "# Types only, no names"


def die(*_: object, **__: object) -> Any:
    """As `kill -9`: nothing is cleaned up, nothing awaited."""
    os._exit(DIED)


def then_die(module: object, name: str) -> None:
    """Let it do its work once more, and die."""
    original = getattr(module, name)

    def last(*args: Any, **more: Any) -> Any:
        done = original(*args, **more)
        if not asyncio.iscoroutine(done):
            die()

        async def awaited() -> None:
            await done
            die()

        return awaited()

    setattr(module, name, last)


def die_once(true: Callable[[], object]) -> None:
    """Die as soon as something holds."""

    def watch() -> None:
        while not true():
            time.sleep(0.002)
        die()

    threading.Thread(target=watch, daemon=True).start()


def runs(program: str) -> bool:
    """Whether a process below this one is that program."""
    for pid in children(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == f"{program}\n":
                return True
    return False


def pause_in_script(home: Path) -> None:
    """Have the export's script wait once everything is mounted, until there is a file `go` in its folder; it then makes `paused`."""
    beside = home / "image_export.sh"
    wait = 'touch "$work/paused"; while [ ! -e "$work/go" ]; do sleep 0.02; done\n'
    beside.write_text(image_export.SCRIPT.read_text().replace(BEFORE_COUNTING, wait + BEFORE_COUNTING, 1))
    image_export.SCRIPT = beside


def made(home: Path, pattern: str) -> Callable[[], object]:
    """Whether there is something of that name below the host's directory."""
    return lambda: next((home / "host").glob(pattern), None)


# What is done to the daemon so that it dies at the step.
EXPORT: dict[str, Callable[[Path], object]] = {
    "the workspace is there": lambda _: setattr(image_export, "make_skeleton", die),
    "the output's file system is made": lambda _: then_die(image_export.command, "run"),
    "the devices are attached": lambda _: setattr(image_export, "_run_script", die),
    "everything is mounted": lambda home: (pause_in_script(home), die_once(made(home, "images/.build-*/paused"))),
    "mkfs.erofs runs": lambda _: die_once(lambda: runs("mkfs.erofs")),
    "the file is made": lambda _: setattr(image_export, "_sha256", die),
    "the file is published": lambda _: then_die(ImageStore, "publish"),
    "the file is handed over": lambda _: None,
}
SAVE: dict[str, Callable[[Path], object]] = {
    "the disk is copied": lambda _: then_die(step_cache, "reflink"),
    "the copy has its name": lambda _: setattr(step_cache.StepCache, "_write", die),
}
IMPORT: dict[str, Callable[[Path], object]] = {
    "the archive arrives": lambda _: None,
    "the archive is there": lambda _: then_die(oci_job.ImportJob, "receive"),
    "skopeo runs": lambda _: die_once(lambda: runs("skopeo")),
    "umoci unpacks": lambda home: die_once(made(home, "mounts/machines/*/disk/unpacked/root/f*")),
    "the tree is tidied": lambda _: then_die(oci_job.ImportJob, "unpack"),
    "mkfs.erofs compresses": lambda _: die_once(lambda: runs("mkfs.erofs")),
    "the import is published": lambda _: then_die(ImageStore, "publish"),
}


def archive() -> bytes:
    """An archive of one image that takes a while to unpack; the same each time."""
    entries = [(f"f{number}", oci.file(b"%d" % number)) for number in range(FILES)]
    return oci.oci_archive([oci.layer([*entries, ("noise", oci.file(bytes(BYTES)))])])


def pieces(step: str) -> Iterator[bytes]:
    """The archive as it is sent."""
    content = archive()
    if step == "the archive arrives":
        yield content[:100_000]
        time.sleep(0.5)
        die()
    yield content


async def export(
    host: Host,
    verb: build_verbs.ExportStep | build_verbs.ScratchImage = EXPORT_IT,
    *,
    at_hand_over: Callable[[], object] = bool,
) -> str:
    """Export the kept step KEY; its digest."""
    async with host.bus.open(host.daemon.host_id, verb.verb, to_wire(verb)) as call:
        async for event in call.events():
            at_hand_over()
            await call.send_end()
            del event
        return str((await call.result())["digest"])


async def save(host: Host, key: str) -> None:
    """Keep a step with something in it, on the empty image: that of a shipped one takes longer."""
    empty = await export(host, build_verbs.ScratchImage())
    guest = await host.ensure(bare=True, user="root", shape=host.shape(image_digest=empty))
    verb = build_verbs.UnpackFiles(guest, "/srv")
    async with host.bus.open(host.daemon.host_id, verb.verb, to_wire(verb)) as call:
        content = oci.layer([("noise", oci.file(os.urandom(BYTES)))])
        for at in range(0, len(content), 262_144):
            await call.send_data(content[at : at + 262_144])
        await call.send_end()
        await call.result()
    await host.request(build_verbs.SaveStep(guest, key))
    await host.destroy(guest)


async def main(home: Path, agent: Path, step: str) -> None:
    """Do what the step belongs to and die there."""
    async with running_host(home, agent=agent, keep_running=True) as host:
        if step in IMPORT:
            IMPORT[step](home)
            await oci.run_import(host, ImportImage("oci-archive"), pieces(step))
        elif step in SAVE:
            SAVE[step](home)
            await save(host, OTHER)
        else:
            EXPORT[step](home)
            await export(host, at_hand_over=die if step == "the file is handed over" else bool)
    print(f"{step}: it did not come to that", file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
