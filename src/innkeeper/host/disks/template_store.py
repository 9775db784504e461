"""Templates of machines: disk and memory of one that had come up, for others to begin as. Whole or not there, and never changed.

They are a cache: what is lost, damaged or of no use any more is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from innkeeper.host.linux.durable import sync, sync_tree
from innkeeper.host.linux.hold import held_folder
from innkeeper.host.linux.sparse import pieces

# See `machine.FORMAT`: the same rules.
FORMAT = 1
MANIFEST = "manifest.json"
DISK = "disk.img"
MEMORY = "memory"
DRAFT = ".draft-"
KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TemplateKey:
    """Everything that a machine's state depends on once it has come up: guests of equal keys begin as the same one.

    `needs` are the driver's (see `contract.Templating.template_needs`); `warmed` are the lines that the guest has run.
    """

    driver: str
    needs: dict[str, str]
    image_digest: str
    vcpu_count: int
    memory_mb: int
    disk_mb: int
    user: str
    warmed: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The name of the template's folder."""
        return hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Template:
    """A template that is there, and was whole when it was made. `files` are path -> digest of its parts."""

    key: TemplateKey
    folder: Path
    files: dict[str, str] = field(default_factory=dict)

    @property
    def disk(self) -> Path:
        """The disk's image, which nobody may mount or write: machines get copies."""
        return self.folder / DISK

    @property
    def memory(self) -> Path:
        """The folder of what the driver has written."""
        return self.folder / MEMORY


class TemplateStore:
    """The templates below `directory`, which shares a file system with the disks: copies of disks do not go further."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # How often each is being read: it must not go under whoever starts a machine from it.
        self._read: Counter[str] = Counter()
        # Those whose content was looked at since the start: nothing writes them.
        self._whole: set[str] = set()
        directory.mkdir(mode=0o700, exist_ok=True)

    def draft(self) -> contextlib.AbstractContextManager[Path]:
        """A private folder for a template that is being made, gone at the end unless it was published. One of a daemon that was killed is nobody's."""
        return held_folder(self._directory, DRAFT)

    def publish(self, draft: Path, key: TemplateKey) -> None:
        """Make a draft, with its disk and the folder of its memory, the key's template. It is on the disk then. Call it in a thread. Raises OSError."""
        parts = [draft / DISK, *sorted((draft / MEMORY).iterdir())]
        files = {str(path.relative_to(draft)): digest_of(path) for path in parts}
        manifest = draft / MANIFEST
        manifest.write_text(json.dumps({"format": FORMAT, "key": asdict(key), "files": files}, indent=1))
        for path in (*parts, manifest):
            path.chmod(0o444)
        sync_tree(draft)
        # Whoever is asked to hold a draft holds the folder, whatever it is called.
        draft.rename(self._directory / key.digest)
        sync(self._directory)
        self._whole.add(key.digest)

    @contextlib.contextmanager
    def reading(self, key: TemplateKey) -> Iterator[Template | None]:
        """The template of a key, which stays for the block and counts as used; None where there is none."""
        name = key.digest
        self._read[name] += 1
        try:
            template = _load(self._directory / name)
            if template is not None:
                # The folder's own time says when it was used: nothing is written into it any more.
                os.utime(template.folder)
            yield template
        finally:
            self._read[name] -= 1
            self._read = +self._read

    def is_whole(self, template: Template) -> bool:
        """Whether its files are as they were made; looked at once since the start. Takes 0.3 s: call it in a thread."""
        name = template.folder.name
        if name not in self._whole:
            try:
                found = {path: digest_of(template.folder / path) for path in template.files}
            except OSError:
                return False
            if found != template.files or not {DISK} <= found.keys():
                return False
            self._whole.add(name)
        return True

    def all(self) -> list[Template]:
        """Those that are there, the one that was not used for longest first."""
        found = []
        for entry in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if KEY.fullmatch(entry.name) and (template := _load(entry)) is not None:
                    found.append((entry.stat().st_mtime_ns, template))
        return [template for _, template in sorted(found, key=lambda item: item[0])]

    def drop(self, name: str) -> bool:
        """Remove a template by its folder's name, in one step; whether it went. One that is being read stays."""
        if self._read[name]:
            return False
        # Under the name of a draft that nobody holds: what is left of a removal that was cut short goes with those.
        doomed = self._directory / f"{DRAFT}{secrets.token_hex(8)}"
        try:
            (self._directory / name).rename(doomed)
        except FileNotFoundError:
            return False
        self._whole.discard(name)
        shutil.rmtree(doomed, ignore_errors=True)
        return True

    def unreadable(self) -> list[Path]:
        """Folders that are no template that this version knows."""
        return sorted(
            entry
            for entry in self._directory.iterdir()
            if not entry.name.startswith(DRAFT) and (not KEY.fullmatch(entry.name) or _load(entry) is None)
        )


def _load(folder: Path) -> Template | None:
    try:
        body = json.loads((folder / MANIFEST).read_text())
        if body["format"] != FORMAT:
            return None
        key = TemplateKey(**{**body["key"], "warmed": tuple(body["key"]["warmed"])})
        files = {str(path): str(digest) for path, digest in body["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # A folder under another's name, or a manifest that was changed, is nobody's template.
    return Template(key, folder, files) if key.digest == folder.name else None


def digest_of(path: Path) -> str:
    """A digest of a file's size and of what in it is not zero: the same however its holes lie. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        digest = hashlib.sha256(os.fstat(descriptor).st_size.to_bytes(8, "big"))
        for at, piece in pieces(descriptor):
            digest.update(at.to_bytes(8, "big"))
            digest.update(piece)
        return digest.hexdigest()
    finally:
        os.close(descriptor)
