"""The kernel of microVMs for a test's state directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def put_kernel(host_dir: Path) -> None:
    """The kernel of microVMs, as if it had been fetched there: its files are those of the cache."""
    # Here, because it needs the whole product, and unit tests do not.
    from tests.integration.booted_vm import boot_files

    kernel = boot_files().kernel.parent
    target = host_dir / "kernels" / kernel.name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copytree(kernel, target, copy_function=_link_or_copy, ignore=shutil.ignore_patterns("initramfs-*"))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
