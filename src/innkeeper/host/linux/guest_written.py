"""A mark on a disk's file: a virtual machine may have written its blocks. What a guest's own kernel wrote the host's kernel never takes in by mounting it.

It is an attribute of the file itself: it goes where the file goes, there is no moment between the two, and copies that share blocks take it along.
"""

from __future__ import annotations

import errno
import os

from innkeeper.errors import GuestWrittenError

# Only root can take it off again.
ATTRIBUTE = "trusted.innkeeper.guest_written"
_NOT_THERE = (errno.ENODATA, errno.EOPNOTSUPP)


def mark(descriptor: int) -> None:
    """Mark an open file, before it is given to a virtual machine that may write it. It is on the disk then. Raises OSError. Nothing for one that is marked."""
    if not is_marked(descriptor):
        os.setxattr(descriptor, ATTRIBUTE, b"1")
        os.fsync(descriptor)


def is_marked(file: int | os.PathLike[str]) -> bool:
    """Whether it is. Raises OSError."""
    try:
        os.getxattr(file, ATTRIBUTE)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        raise
    return True


def carry(source: int, target: int) -> None:
    """Give a file that is about to get another's blocks the mark of that one, if it has it. File systems that share blocks keep the order of the two."""
    if is_marked(source):
        os.setxattr(target, ATTRIBUTE, b"1")


def check(descriptor: int) -> None:
    """Raise GuestWrittenError for a marked file."""
    if is_marked(descriptor):
        raise GuestWrittenError
