"""Unix sockets at any path: an address holds 107 bytes at most, so they are named through their directory's descriptor."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def address(path: Path) -> Iterator[str]:
    """An address for `path` that is good within the block. Raises OSError when its directory is not there."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path, *, backlog: int) -> socket.socket:
    """A listening socket at `path` that root alone may connect to, in place of one that somebody left there. It does not block. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        with address(path) as name:
            path.unlink(missing_ok=True)
            listener.bind(name)
        path.chmod(0o600)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: Path) -> socket.socket:
    """A socket that is connected to whoever listens at `path`, and does not block from then on. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Also this does not wait: a full queue of whoever does not take connections is EAGAIN.
        connection.setblocking(False)
        with address(path) as name:
            connection.connect(name)
    except BaseException:
        connection.close()
        raise
    return connection
