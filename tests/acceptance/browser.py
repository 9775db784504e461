"""A real browser: Debian's Chromium, without a window, with a profile of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
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
        # It writes nothing there; its end is that of the last of its processes.
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # All of them: one that lives a moment longer writes into a folder that is removed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        shutil.rmtree(home)
