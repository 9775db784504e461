from pathlib import Path

import pytest

from innkeeper.host.linux import cgroup
from innkeeper.host.linux.cgroup import CgroupTree, GroupV1, GroupV2
from innkeeper.host.linux.mounts import parse_mountinfo

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
PURE = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"


def test_a_hybrid_host_counts_as_version_1() -> None:
    tree = CgroupTree.detect(parse_mountinfo(HYBRID))
    assert tree.version == 1
    assert tree.missing() == ["pids"]
    group = tree.server_root("innkeeper-1").child("guest")
    assert group.path == "/innkeeper-1/guest"
    assert group.directories() == [
        Path("/sys/fs/cgroup", controllers, "innkeeper-1/guest") for controllers in ("memory", "cpu,cpuacct", "freezer")
    ]


def test_a_pure_host_is_version_2() -> None:
    tree = CgroupTree.detect(parse_mountinfo(PURE))
    assert tree.version == 2
    assert tree.group("/a").directories() == [Path("/sys/fs/cgroup/a")]


def test_no_control_groups_at_all() -> None:
    with pytest.raises(OSError, match="no control group"):
        CgroupTree.detect([])


def test_version_2_files(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    group = GroupV2(tmp_path, "guest")
    group.create()
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids"
    for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max"):
        (group.directory / name).touch()
    group.set_limits(memory_bytes=1 << 29, cpu_quota=1.5, pids_max=2048)
    assert (group.directory / "memory.max").read_text() == "536870912"
    assert (group.directory / "memory.swap.max").read_text() == "0"
    assert (group.directory / "cpu.max").read_text() == "150000 100000"
    assert (group.directory / "pids.max").read_text() == "2048"
    group.set_limits(memory_bytes=None, cpu_quota=None, pids_max=None)
    assert (group.directory / "memory.max").read_text() == "max"
    assert (group.directory / "cpu.max").read_text() == "max 100000"

    (group.directory / "cpu.stat").write_text("usage_usec 1234\nuser_usec 1\n")
    (group.directory / "memory.current").write_text("4096\n")
    (group.directory / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert group.usage() == cgroup.Usage(cpu_us=1234, memory_bytes=4096, oom_kills=2)


def test_version_1_usage(tmp_path: Path) -> None:
    group = GroupV1({"memory": tmp_path / "memory", "cpuacct": tmp_path / "cpuacct"}, "guest")
    group.create()
    (tmp_path / "memory/guest/memory.usage_in_bytes").write_text("8192\n")
    (tmp_path / "memory/guest/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    (tmp_path / "cpuacct/guest/cpuacct.usage").write_text("7000000\n")
    assert group.usage() == cgroup.Usage(cpu_us=7000, memory_bytes=8192, oom_kills=5)


def test_a_quota_is_never_less_than_the_kernel_takes() -> None:
    assert cgroup.quota_us(0.001) == 1000
    assert cgroup.quota_us(2) == 200_000


def _delegated(top: Path) -> Path:
    unit = top / "system.slice/innkeeper-guests.service"
    unit.mkdir(parents=True)
    for directory in (top, unit.parent, unit):
        (directory / "cgroup.controllers").write_text("cpu memory pids\n")
        (directory / "cgroup.subtree_control").write_text("cpu memory pids\n" if directory != unit else "")
    return unit


def test_guests_live_where_systemd_lets_them(tmp_path: Path) -> None:
    unit = _delegated(tmp_path)
    group = CgroupTree(2, {"unified": tmp_path}).server_root("innkeeper-1").child("guest")
    assert group.path == "/system.slice/innkeeper-guests.service/innkeeper-1/guest"
    group.create()
    assert (unit / "innkeeper-1" / "guest").is_dir()
    # Nothing above the delegated group is written: that is systemd's.
    assert [(path / "cgroup.subtree_control").read_text() for path in (tmp_path, unit.parent)] == [
        "cpu memory pids\n"
    ] * 2
    assert sorted((unit / "cgroup.subtree_control").read_text().split()) == ["+cpu", "+memory", "+pids"]


def test_without_delegation_guests_live_at_the_top(tmp_path: Path) -> None:
    assert CgroupTree(2, {"unified": tmp_path}).server_root("innkeeper-1").path == "/innkeeper-1"


def test_guests_that_are_at_the_top_are_found_there_again(tmp_path: Path) -> None:
    _delegated(tmp_path)
    (tmp_path / "innkeeper-1").mkdir()
    tree = CgroupTree(2, {"unified": tmp_path})
    assert tree.server_root("innkeeper-1").path == "/innkeeper-1"
    assert tree.server_root("innkeeper-2").path == "/system.slice/innkeeper-guests.service/innkeeper-2"


def test_processes_of_other_namespaces_are_never_signalled(tmp_path: Path) -> None:
    (tmp_path / "guest").mkdir()
    (tmp_path / "guest" / "cgroup.procs").write_text("0\n17\n")
    assert GroupV2(tmp_path, "guest").procs() == [17]
