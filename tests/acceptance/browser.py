"""A real browser: Debian's Chromium, without a window, with a profile of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

CHROMIUM = shutil.which("chromium")
# No sandbox of its own: it does not run as root. Nothing of what it would fetch by itself.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--no-proxy-server",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-crash-reporter",
)  # fmt: skip


@contextlib.contextmanager
def showing(url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A browser that shows a page until the context ends; nothing of it is left."""
    assert CHROMIUM is not None
    home = Path(tempfile.mkdtemp(prefix="ikb", dir="/var/tmp"))
    process = subprocess.Popen(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={home}/profile", url],
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # It ends its children itself.
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(home, ignore_errors=True)
