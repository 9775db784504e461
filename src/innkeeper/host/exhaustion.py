"""What the host has run out of, as an error that a client may read: disk, descriptors, processes, memory."""

from __future__ import annotations

import errno

from innkeeper.errors import UnavailableError

_OUT_OF = {
    errno.ENOSPC: "The host's disk is full",
    errno.EDQUOT: "The host's disk is full",
    errno.EMFILE: "The host has no file descriptors left",
    errno.ENFILE: "The host has no file descriptors left",
    errno.EAGAIN: "The host can start no more processes",
    errno.ENOMEM: "The host has no memory left",
}
RETRY_SECONDS = 30


def unavailable(error: OSError) -> UnavailableError | None:
    """The error that says what ran out; None for an OSError of another kind."""
    sentence = None if error.errno is None else _OUT_OF.get(error.errno)
    return None if sentence is None else UnavailableError(sentence, retry_after_seconds=RETRY_SECONDS)
