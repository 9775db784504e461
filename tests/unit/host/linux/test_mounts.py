from pathlib import Path

import pytest

from innkeeper.host.linux import mounts

MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
36 35 98:0 /mnt1 /mnt\0402\011tab rw,noatime master:1 shared:7 - ext3 /dev/root\134x rw,errors=continue
37 35 0:55 / /weird rw - fuse.x  rw
"""


def test_mountinfo_is_read_with_its_escapes_and_optional_fields() -> None:
    proc, odd, nameless = mounts.parse_mountinfo(MOUNTINFO)
    assert (proc.target, proc.fstype, proc.shared) == ("/proc", "proc", False)
    assert odd.target == "/mnt 2\ttab"
    assert odd.source == "/dev/root\\x"
    assert odd.root == "/mnt1"
    assert odd.shared
    assert odd.options == {"rw", "noatime"}
    assert odd.super_options == {"rw", "errors=continue"}
    assert nameless.source == ""


def test_this_machine() -> None:
    assert mounts.is_mounted("/proc")
    assert not mounts.is_mounted("/proc/self/../nothing")
    assert [mount.target for mount in mounts.mounts_under("/proc")][-1] == "/proc"


def test_a_system_call_that_fails_names_itself_and_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="umount2") as failure:
        mounts.umount2(tmp_path / "absent")
    assert failure.value.filename == str(tmp_path / "absent")
