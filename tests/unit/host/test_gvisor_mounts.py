from pathlib import Path

from innkeeper.host.drivers.gvisor import mount_table


def test_directories_are_read_only_whatever_they_are_called() -> None:
    hidden, plain, odd = mount_table(Path("/a/b"), Path("/a dir/with\ttabs\\and\n#more")).splitlines()
    assert hidden.split()[1] == "/proc/sys/net"
    assert plain == "/a/b /a/b none bind,ro,nosuid,nodev 0 0"
    name = r"/a\040dir/with\011tabs\134and\012\043more"
    assert odd == f"{name} {name} none bind,ro,nosuid,nodev 0 0"
