"""Makes an image of a kept step: the merged tree of its disk and the image below becomes one EROFS file.

What is read was written by a guest. The kernel reads it through the same mounts as for any guest; mkfs.erofs reads it as user `nobody` with the one
capability to read everything, in a root directory in which there is nothing else to read, without network, in namespaces that take every mount and process
with them, however they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shlex
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import structlog

from innkeeper.errors import InnkeeperError, PayloadTooLargeError, UnavailableError
from innkeeper.host.disks.image_build import EROFS_OPTIONS, LET_GO_SCRIPT
from innkeeper.host.linux import command, loop_device

log = structlog.stdlib.get_logger(__name__)

SCRIPT = Path(__file__).with_name("image_export.sh")
# Always the same: equal trees then make equal files.
IMAGE_UUID = uuid.uuid5(uuid.NAMESPACE_OID, "innkeeper image")
FILES_MAX = 2_000_000
EXPORT_SECONDS = 1_800
TAIL_CHARACTERS = 500
# What the file system of the output needs for itself, beside a 64th.
OUT_SPARE_BYTES = 67_108_864
# With less, an export that failed did so for want of space.
FREE_BYTES_MIN = 16_777_216
# Of the script: more files, or more bytes, than an image may have.
TOO_MANY_FILES, TOO_LARGE = 3, 4


class ImageExportFailed(InnkeeperError):  # noqa: N818  # reads as a sentence where it is raised
    """The image could not be made of what was built."""

    code = "image_export_failed"


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What to export: a disk to mount (a copy, which is written to), the image below it, or neither for the empty image. Limits in bytes and files."""

    disk: Path | None
    lower: Path | None
    max_bytes: int
    max_files: int = FILES_MAX


@dataclass(frozen=True, slots=True)
class ExportedImage:
    """A finished EROFS file, its digest, and how many files are in it."""

    path: Path
    digest: str
    files: int


def plan_text(
    plan: ExportPlan, work: Path, *, disk: Path | None, lower: Path | None, output: Path, uid: int, gid: int
) -> str:
    """The shell assignments that image_export.sh reads."""
    values = {
        "work": work,
        "disk": disk or "",
        "lower": lower or "",
        "output": output,
        "max_bytes": plan.max_bytes,
        "max_files": plan.max_files,
        "uid": uid,
        "gid": gid,
        "uuid": IMAGE_UUID,
        "erofs_options": EROFS_OPTIONS,
    }
    return "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items())


def make_skeleton(directory: Path) -> None:
    """The topmost layer: what every image has, and what hides the agent's traces.

    /tmp holds a hidden entry, for runsc covers an empty one with a tmpfs of its own; /.innkeeper is where the agent is bound, and its opaque mark hides
    whatever lies in the layers below.
    """
    for path, mode in (
        ("", 0o755),
        ("tmp", 0o1777),
        ("tmp/.innkeeper", 0o555),
        (".innkeeper", 0o755),
        (".innkeeper/bin", 0o755),
        (".innkeeper/link", 0o755),
    ):
        (directory / path).mkdir()
        (directory / path).chmod(mode)
    os.setxattr(directory / ".innkeeper", "user.overlay.opaque", b"y")
    for path in (".innkeeper/link", ".innkeeper/bin", ".innkeeper", "tmp/.innkeeper", "tmp", ""):
        os.utime(directory / path, (0, 0))


async def export_image(plan: ExportPlan, work: Path, *, uid: int, gid: int) -> ExportedImage:
    """The image of a plan, made in the empty folder `work`, by mkfs.erofs as `uid` and `gid`. Equal trees make equal files.

    Raises:
        PayloadTooLargeError: more bytes or files than the plan allows.
        UnavailableError: the host's disk is full.
        ImageExportFailed: anything else that a tree can do; CommandTimedOut.

    """
    await asyncio.to_thread(make_skeleton, work / "skeleton")
    out = work / "out.img"
    out.touch(mode=0o600)
    os.truncate(out, plan.max_bytes + plan.max_bytes // 64 + OUT_SPARE_BYTES)
    argv = [
        "mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0",
        "-E", f"nodiscard,assume_storage_prezeroed=1,root_owner={uid}:{gid}", "--", str(out),
    ]  # fmt: skip
    try:
        await command.run(argv)
    except command.CommandFailed as error:
        _check_space(work, error)
        raise
    # Attached here and not by mount(8), which loses against others that look for a free device at the same moment.
    with contextlib.ExitStack() as devices:
        disk = plan.disk and devices.enter_context(loop_device.attach(plan.disk)).path
        lower = plan.lower and devices.enter_context(loop_device.attach(plan.lower, read_only=True)).path
        output = devices.enter_context(loop_device.attach(out)).path
        text = plan_text(plan, work, disk=disk, lower=lower, output=output, uid=uid, gid=gid)
        (work / "plan.sh").write_text(text)
        await _run_script(plan, work)
    image = work / "image.erofs"
    digest = await asyncio.to_thread(_sha256, image)
    return ExportedImage(image, digest, int((work / "files").read_text()))


async def _run_script(plan: ExportPlan, work: Path) -> None:
    argv = [
        "setpriv", "--pdeathsig", "KILL", "--",
        "unshare", "--mount", "--propagation", "private", "--net", "--ipc", "--pid", "--fork", "--kill-child=KILL",
        "bash", str(LET_GO_SCRIPT), str(work.parent.parent), "bash", str(SCRIPT), str(work / "plan.sh"),
    ]  # fmt: skip
    done = await command.run(argv, timeout_seconds=EXPORT_SECONDS, check=False)
    if done.returncode == TOO_MANY_FILES:
        raise PayloadTooLargeError(f"The image would have more than {plan.max_files} files")
    if done.returncode == TOO_LARGE:
        raise PayloadTooLargeError(f"The image would be larger than {plan.max_bytes >> 20} MiB")
    if done.returncode != 0:
        # For the log alone: what the tools say may quote names that a guest chose.
        tail = (done.stdout + done.stderr).decode(errors="replace")[-TAIL_CHARACTERS:]
        log.error("an image could not be made", status=command.describe_status(done.returncode), said=tail)
        _check_space(work)
        raise ImageExportFailed


def _check_space(work: Path, cause: Exception | None = None) -> None:
    """Raise UnavailableError where a tool failed because there is no room."""
    if shutil.disk_usage(work).free < FREE_BYTES_MIN:
        raise UnavailableError("The host's disk is full") from cause


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
