"""Memory that many processes map privately and nobody can write: a memfd under seals of the kernel's."""

from __future__ import annotations

import fcntl
import os

# The seals hold for whoever opens the file for writing, too, and for root: what is left are private mappings.
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def new_memory(size_bytes: int) -> int:
    """A descriptor of memory that reads as zeros, which takes room where something is written. Raises OSError."""
    descriptor = os.memfd_create("innkeeper", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        # QEMU opens it anew, through its own descriptor and as a user of its own.
        os.fchmod(descriptor, 0o666)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def seal(descriptor: int) -> None:
    """Keep the memory as it is, for good. Raises OSError (EBUSY) while somebody has it mapped for writing."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
