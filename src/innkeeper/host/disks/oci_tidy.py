"""Makes an unpacked OCI image fit to be a guest's root, and says what its configuration is. Runs inside the jail, by the host's own Python, alone.

    python3 -I -S oci_tidy.py LAYOUT ROOTFS MAX_FILES MAX_BYTES

Writes one JSON object: `{"files", "bytes", "created", "config"}`, or `{"error": a sentence}` with exit status 3. Standard library only, nothing of ours:
all that is there is this file.
"""

# One stat call a file; a Path object for each would double the time of 200,000 files.
# ruff: noqa: PTH101, PTH102, PTH108, PTH112, PTH114, PTH118, PTH123

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
import stat
import sys
from typing import Any, NoReturn

DOCUMENT_BYTES_MAX = 4 * 1_048_576
CONFIG_BYTES_MAX = 65_536
UNKNOWN_ID = 65_534
OWNER = "user.rootlesscontainers"
# runsc makes mount points where they are missing, in the guest's own disk, and follows links that stand in their place.
MOUNT_POINTS = {"proc": 0o555, "sys": 0o555, "dev": 0o755, ".innkeeper": 0o755, ".innkeeper/bin": 0o755, ".innkeeper/link": 0o755, "tmp": 0o1777}  # fmt: skip
# runsc covers an empty /tmp with a tmpfs, out of reach of the disk, its quota and the change scan.
HIDDEN = "tmp/.innkeeper"
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def main() -> None:
    """Tidy and describe."""
    layout, root, max_files, max_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    config, created = read_config(layout)
    files, size = tidy(root, max_files, max_bytes)
    make_mount_points(root)
    print(json.dumps({"files": files, "bytes": size, "created": created, "config": config}))


def refuse(sentence: str) -> NoReturn:
    """End with the reason."""
    print(json.dumps({"error": sentence}))
    raise SystemExit(3)


def read_config(layout: str) -> tuple[dict[str, Any], int]:
    """The image's configuration, in our words, and when it was made (seconds since 1970)."""
    try:
        index = _document(os.path.join(layout, "index.json"))
        manifest = _blob(layout, index["manifests"][0]["digest"])
        document = _blob(layout, manifest["config"]["digest"])
        told = document.get("config") or {}
        env = dict(entry.split("=", 1) for entry in told.get("Env") or () if "=" in entry)
        config = {
            "user": str(told.get("User") or "root"),
            "workdir": str(told.get("WorkingDir") or ""),
            "env": env,
            "entrypoint": [str(word) for word in told.get("Entrypoint") or ()],
            "cmd": [str(word) for word in told.get("Cmd") or ()],
            "exposed_ports": sorted(map(str, told.get("ExposedPorts") or ())),
            "labels": {str(key): str(value) for key, value in (told.get("Labels") or {}).items()},
        }
        created = document.get("created")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        refuse("the image's configuration cannot be read")
    if len(json.dumps(config)) > CONFIG_BYTES_MAX:
        refuse(f"the image's configuration has more than {CONFIG_BYTES_MAX} bytes")
    return config, _seconds(created)


def _seconds(created: object) -> int:
    with contextlib.suppress(ValueError, OverflowError):
        # Python 3.11 reads no more than six digits of a fraction.
        moment = datetime.datetime.fromisoformat(re.sub(r"\.\d+", "", str(created)))
        return max(0, min(int(moment.timestamp()), 1 << 32))
    return 0


def _document(path: str) -> Any:
    with open(path, "rb") as file:
        content = file.read(DOCUMENT_BYTES_MAX + 1)
    if len(content) > DOCUMENT_BYTES_MAX:
        raise ValueError("too large")
    return json.loads(content)


def _blob(layout: str, digest: object) -> Any:
    found = DIGEST.fullmatch(str(digest))
    if found is None:
        raise ValueError("not a digest")
    return _document(os.path.join(layout, "blobs", "sha256", found[1]))


def tidy(root: str, max_files: int, max_bytes: int) -> tuple[int, int]:
    """Give every file its owner, drop devices, and count: files, and bytes as their lengths say."""
    files, size = 0, 0
    seen: set[int] = set()
    for directory, folders, names in os.walk(root, onerror=_raise):
        for path in (directory, *(os.path.join(directory, name) for name in _leaves(directory, folders, names))):
            status = os.lstat(path)
            files += 1
            if files > max_files:
                refuse(f"the image has more than {max_files} files")
            if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                os.unlink(path)
                continue
            if stat.S_ISREG(status.st_mode) and status.st_ino not in seen:
                # Hard links count once. Lengths, not blocks: compressing reads the holes of a sparse file too.
                size += status.st_size
                if status.st_nlink > 1:
                    seen.add(status.st_ino)
            if size > max_bytes:
                refuse(f"the image has more than {max_bytes >> 20} MiB of files")
            if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                _own(path, status)
    return files, size


def _leaves(directory: str, folders: list[str], names: list[str]) -> list[str]:
    """What `os.walk` does not visit by itself: files, and links to directories."""
    return [*names, *(name for name in folders if os.path.islink(os.path.join(directory, name)))]


def _raise(error: OSError) -> None:
    raise error


def _own(path: str, status: os.stat_result) -> None:
    # Where umoci, without privileges, wrote whose the file is.
    try:
        owner = os.getxattr(path, OWNER, follow_symlinks=False)
    except OSError:
        return
    uid, gid = owner_of(owner)
    os.chown(path, uid, gid, follow_symlinks=False)
    os.chmod(path, stat.S_IMODE(status.st_mode))


def owner_of(value: bytes) -> tuple[int, int]:
    """(uid, gid) of the protocol buffer that rootless tools keep: field 1 and 2, each a varint. What is none, or too large, is nobody's."""
    numbers = {1: 0, 2: 0}
    at = 0
    while at < len(value):
        field = value[at] >> 3
        if value[at] & 7 or field not in numbers:
            return UNKNOWN_ID, UNKNOWN_ID
        at += 1
        number, shift = 0, 0
        while True:
            if at >= len(value) or shift > 63:
                return UNKNOWN_ID, UNKNOWN_ID
            number |= (value[at] & 0x7F) << shift
            shift += 7
            at += 1
            if not value[at - 1] & 0x80:
                break
        numbers[field] = number if number <= 65_535 else UNKNOWN_ID
    return numbers[1], numbers[2]


def make_mount_points(root: str) -> None:
    """Real directories where the guest gets mounts, an empty /dev, and a /tmp that is not empty."""
    for name in ("dev", ".innkeeper"):
        path = os.path.join(root, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
    for name, mode in MOUNT_POINTS.items():
        path = os.path.join(root, name)
        if os.path.islink(path) or not os.path.isdir(path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.mkdir(path)
            os.chmod(path, mode)
    hidden = os.path.join(root, HIDDEN)
    if not os.path.lexists(hidden):
        os.mkdir(hidden, 0o555)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        refuse(f"the image's files cannot be tidied: {error.strerror}")
