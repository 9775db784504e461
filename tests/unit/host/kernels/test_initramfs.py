"""The initramfs as other programs read it, and the modules' order as the kernel needs it."""

from __future__ import annotations

import gzip
import lzma
import stat
from pathlib import Path

import pytest

from innkeeper.host.kernels.initramfs import Entry, cpio, initramfs
from innkeeper.host.kernels.modules import ModuleMissingError, load_order, module_name, offered, read_module


def fields(archive: bytes) -> dict[str, tuple[int, bytes, list[int]]]:
    """{path: (mode, content, every number of the header)} of a newc archive, read by its specification."""
    found = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        size, name_size = numbers[6], numbers[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        assert archive[at + 110 + name_size - 1] == 0
        at = (at + 110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert not archive[at:].strip(b"\0")
            return found
        found[name] = (numbers[1], archive[at : at + size], numbers)
        at = (at + size + 3) // 4 * 4


def test_what_a_guest_boots_from() -> None:
    packed = initramfs(b"agent", [("virtio_ring", b"first"), ("virtio", b"")])
    found = fields(gzip.decompress(packed))
    assert list(found) == ["dev", "dev/null", "init", "modules", "modules/00-virtio_ring.ko", "modules/01-virtio.ko"]
    assert found["init"][:2] == (stat.S_IFREG | 0o755, b"agent")
    assert found["modules/00-virtio_ring.ko"][1] == b"first"
    null = found["dev/null"]
    assert stat.S_ISCHR(null[0])
    assert null[2][9:11] == [1, 3]
    # Of nobody and no time.
    assert {(numbers[2], numbers[3], numbers[5]) for _, _, numbers in found.values()} == {(0, 0, 0)}
    # Each has an inode of its own: the kernel takes two files with one for the same file.
    assert len({numbers[0] for _, _, numbers in found.values()}) == len(found)


def test_what_is_loaded_later_lies_beside_and_is_no_part_of_the_boot() -> None:
    found = fields(gzip.decompress(initramfs(b"agent", [], [("fuse.ko.gz", b"packed"), ("modules.dep", b"fuse:\n")])))
    assert found["offered/fuse.ko.gz"][:2] == (stat.S_IFREG | 0o644, b"packed")
    assert [name for name in found if name.startswith("modules/")] == []


def test_what_is_offered_is_described_for_itself_alone() -> None:
    dependencies = """kernel/lib/libcrc32c.ko:
kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko
kernel/fs/jbd2/jbd2.ko:
kernel/net/802/stp.ko: kernel/net/llc/llc.ko
kernel/net/llc/llc.ko:
kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko kernel/net/llc/llc.ko
kernel/net/bridge/br_netfilter.ko: kernel/net/bridge/bridge.ko kernel/net/802/stp.ko kernel/net/llc/llc.ko kernel/fs/jbd2/jbd2.ko
kernel/fs/fuse/fuse.ko:
kernel/fs/other/other.ko:
"""
    built_in = "".join(
        f"kernel/{name}.ko\n"
        for name in (
            "virtio_mmio",
            "virtio_console",
            "virtio_blk",
            "virtio_rng",
            "virtio_net",
            "virtio_scsi",
            "sd_mod",
            "overlay",
            "erofs",
        )
    )
    aliases = "# made by depmod\nalias rtnl-link-bridge bridge\nalias fs-other other\nalias fs-ext4 ext4\nalias char-major-10-229 fuse\n"
    files, described = offered(dependencies, built_in, aliases, "# nodes\nfuse fuse c10:229\nother other c10:1\n")
    assert [module_name(path) for path in files] == ["fuse", "llc", "stp", "bridge", "br_netfilter"]
    assert described == {
        "modules.dep": "stp: llc\nllc:\nbridge: stp llc\nbr_netfilter: bridge stp llc\nfuse:\n",
        "modules.alias": "alias rtnl-link-bridge bridge\nalias char-major-10-229 fuse\n",
        "modules.devname": "fuse fuse c10:229\n",
    }


def test_the_same_parts_make_the_same_bytes() -> None:
    parts = b"agent", [("a", b"x"), ("b", b"y")]
    assert initramfs(*parts) == initramfs(*parts)
    assert initramfs(*parts) != initramfs(b"agent", [("b", b"y"), ("a", b"x")])


def test_a_path_out_of_the_archive_is_refused() -> None:
    for path in ("/init", "modules/ö"):
        with pytest.raises(ValueError, match="not a path"):
            cpio([Entry(path, stat.S_IFREG)])


@pytest.mark.parametrize("size", range(5))
def test_every_length_is_padded(size: int) -> None:
    entries = [Entry("x" * (size + 1), stat.S_IFREG | 0o600, b"y" * size), Entry("last", stat.S_IFREG, b"z")]
    found = fields(cpio(entries))
    assert [content for _, content, _ in found.values()] == [b"y" * size, b"z"]


DEPENDENCIES = """\
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/net/virtio_net.ko.xz: kernel/net/net_failover.ko kernel/net/failover.ko kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/net/net_failover.ko: kernel/net/failover.ko
kernel/net/failover.ko:
kernel/drivers/char/virtio-rng.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
"""


def test_a_module_follows_what_it_needs() -> None:
    order = load_order(DEPENDENCIES, "kernel/fs/ext4/ext4.ko\n", ("virtio_rng", "ext4", "virtio_net"))
    assert [module_name(path) for path in order] == [
        "virtio_ring",
        "virtio",
        "virtio_rng",
        "failover",
        "net_failover",
        "virtio_net",
    ]


def test_a_kernel_without_a_module_is_no_good() -> None:
    with pytest.raises(ModuleMissingError, match="erofs"):
        load_order(DEPENDENCIES, "kernel/fs/ext4/ext4.ko\n", ("virtio_rng", "erofs"))


def test_modules_are_unpacked_and_otherwise_left_alone(tmp_path: Path) -> None:
    content = b"\x7fELF with a signature behind it" * 100
    (tmp_path / "plain.ko").write_bytes(content)
    (tmp_path / "packed.ko.xz").write_bytes(lzma.compress(content))
    (tmp_path / "other.ko.zst").write_bytes(content)
    (tmp_path / "damaged.ko.xz").write_bytes(content)
    assert read_module(tmp_path / "plain.ko") == read_module(tmp_path / "packed.ko.xz") == content
    for name in ("other.ko.zst", "damaged.ko.xz"):
        with pytest.raises(ValueError, match=name):
            read_module(tmp_path / name)
