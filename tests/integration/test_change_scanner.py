"""What the change scanner reports, on real overlays."""

from __future__ import annotations

import mmap
import os
import shutil
import socket
from collections.abc import Callable

import pytest
from tests.integration.scanned_guest import SCANNER_MARKS, Guest, Store, changes, new_guest, run

from innkeeper.host.change_scanner import ChangeScanner, FileChange

pytestmark = SCANNER_MARKS


async def test_a_created_a_modified_and_a_deleted_file_are_reported_once(scanner: ChangeScanner, guest: Guest) -> None:
    (guest.root / "made-by-configure").write_text("x")
    assert await scanner.baseline(guest.target) == 1
    (guest.root / "home/user/deep").mkdir(parents=True)
    (guest.root / "home/user/deep/new").write_text("hello")
    (guest.root / "etc/passwd").write_text("root")
    (guest.root / "top").unlink()
    found = await scanner.changes(guest.target, result=guest.next_result())
    assert found.rows == (
        FileChange(b"/etc/passwd", "modified", 4, "file"),
        FileChange(b"/home/user/deep/new", "created", 5, "file"),
        FileChange(b"/top", "deleted", 0, "file"),
    )
    assert found.total == 3
    assert found.duration_us > 0
    assert await changes(scanner, guest) == []


async def test_symlinks_are_listed_and_not_followed(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    (guest.root / "out").symlink_to("/")
    (guest.root / "etc/link").unlink()
    (guest.root / "etc/link").symlink_to("nowhere-at-all")
    found = await scanner.changes(guest.target, result=guest.next_result())
    assert found.rows == (
        FileChange(b"/etc/link", "modified", 14, "symlink"),
        FileChange(b"/out", "created", 1, "symlink"),
    )


async def test_names_are_bytes(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    strange = [b"\xff\xfe", b"new\nline", b"a" * 255, "é".encode(), b" ", b'"', b"\x01"]
    for name in strange:
        os.close(os.open(os.fsencode(guest.root) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    assert await changes(scanner, guest) == [("created", b"/" + name) for name in sorted(strange)]
    assert await changes(scanner, guest) == []


async def test_rows_are_sorted_by_path_component(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    (guest.root / "a").mkdir()
    for path in ("a.b", "a/z", "a-", "b"):
        (guest.root / path).touch()
    assert [path for _, path in await changes(scanner, guest)] == [b"/a/z", b"/a-", b"/a.b", b"/b"]


async def test_touch_chmod_and_chown_alone_are_modifications(scanner: ChangeScanner, guest: Guest) -> None:
    names = ("touched", "chmodded", "chowned", "untouched")
    for name in names:
        (guest.root / name).write_text("x")
    await scanner.baseline(guest.target)
    (guest.root / "touched").touch()
    (guest.root / "chmodded").chmod(0o600)
    os.chown(guest.root / "chowned", 1000, 1000)
    (guest.root / "etc/passwd").chmod(0o600)
    assert await changes(scanner, guest) == [
        ("modified", b"/chmodded"),
        ("modified", b"/chowned"),
        ("modified", b"/etc/passwd"),
        ("modified", b"/touched"),
    ]


async def test_a_copy_up_that_changes_nothing_is_absent(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    passwd = guest.root / "etc/passwd"
    os.close(os.open(passwd, os.O_WRONLY))  # opening for writing copies up
    ca = guest.root / "etc/ssl/certs/ca.pem"
    ca.chmod(ca.stat().st_mode)
    os.chown(guest.root / "usr/lib", 0, 0)
    assert (guest.target.upper / "etc/passwd").exists()
    assert await changes(scanner, guest) == []
    passwd.write_text("now")
    assert await changes(scanner, guest) == [("modified", b"/etc/passwd")]


async def test_made_and_deleted_in_one_command_is_absent(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    (guest.root / "dir").mkdir()
    (guest.root / "dir/file").touch()
    shutil.rmtree(guest.root / "dir")
    assert await changes(scanner, guest) == []


async def test_rename_over_a_file(scanner: ChangeScanner, guest: Guest) -> None:
    (guest.root / "one").write_text("1")
    (guest.root / "two").write_text("2")
    stamp = (1_700_000_000_000_000_000, (guest.root / "one").stat().st_mtime_ns)
    os.utime(guest.root / "two", ns=stamp)  # the same clock tick
    await scanner.baseline(guest.target)
    (guest.root / "two").rename(guest.root / "one")
    assert await changes(scanner, guest) == [("modified", b"/one"), ("deleted", b"/two")]
    (guest.root / "new").write_text("over the image's")
    (guest.root / "new").rename(guest.root / "etc/passwd")
    assert await changes(scanner, guest) == [("modified", b"/etc/passwd")]


async def test_a_file_put_back_as_it_was_is_no_change(scanner: ChangeScanner, guest: Guest) -> None:
    (guest.root / "mine").write_text("x")
    os.utime(guest.root / "mine", ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789))
    await scanner.baseline(guest.target)
    for path in (guest.root / "mine", guest.root / "etc/passwd"):
        saved = guest.root / "saved"
        run("cp", "-p", path, saved)
        path.unlink()
        run("cp", "-p", saved, path)
        saved.unlink()
    assert await changes(scanner, guest) == []


async def test_a_file_deleted_and_later_restored_is_created(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    run("cp", "-p", guest.root / "etc/passwd", guest.home / "saved")
    (guest.root / "etc/passwd").unlink()
    assert await changes(scanner, guest) == [("deleted", b"/etc/passwd")]
    run("cp", "-p", guest.home / "saved", guest.root / "etc/passwd")
    assert await changes(scanner, guest) == [("created", b"/etc/passwd")]


async def test_a_file_replaced_by_a_directory_and_back(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    top = guest.root / "top"
    top.unlink()
    top.mkdir()
    (top / "inside").touch()
    assert await changes(scanner, guest) == [("deleted", b"/top"), ("created", b"/top/inside")]
    shutil.rmtree(top)
    top.write_text("a file again")
    assert await changes(scanner, guest) == [("created", b"/top"), ("deleted", b"/top/inside")]


async def test_a_deleted_image_directory_gives_every_file_it_held(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    shutil.rmtree(guest.root / "usr/lib")
    gone = [b"/usr/lib/x/one", b"/usr/lib/x/two", b"/usr/lib/y/three"]
    assert await changes(scanner, guest) == [("deleted", path) for path in gone]
    (guest.root / "usr/lib/x").mkdir(parents=True)
    (guest.root / "usr/lib/x/two").touch()
    assert await changes(scanner, guest) == [("created", b"/usr/lib/x/two")]


async def test_an_emptied_image_directory_made_anew_in_one_command(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    shutil.rmtree(guest.root / "usr/lib")
    (guest.root / "usr/lib/x").mkdir(parents=True)
    (guest.root / "usr/lib/x/two").write_text("other")
    assert await changes(scanner, guest) == [
        ("deleted", b"/usr/lib/x/one"),
        ("modified", b"/usr/lib/x/two"),
        ("deleted", b"/usr/lib/y/three"),
    ]
    assert await changes(scanner, guest) == []


async def test_a_directory_replaced_by_a_symlink(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    shutil.rmtree(guest.root / "usr/lib/x")
    (guest.root / "usr/lib/x").symlink_to("/etc")
    assert await changes(scanner, guest) == [
        ("created", b"/usr/lib/x"),
        ("deleted", b"/usr/lib/x/one"),
        ("deleted", b"/usr/lib/x/two"),
    ]


async def test_hard_links_and_sparse_files(scanner: ChangeScanner, guest: Guest) -> None:
    (guest.root / "first").write_text("shared")
    await scanner.baseline(guest.target)
    (guest.root / "second").hardlink_to(guest.root / "first")
    with (guest.root / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    found = await scanner.changes(guest.target, result=guest.next_result())
    assert found.rows == (
        FileChange(b"/second", "created", 6, "file"),
        FileChange(b"/sparse", "created", 1 << 40, "file"),
    )
    with (guest.root / "second").open("a") as file:
        file.write("!")
    assert await changes(scanner, guest) == [("modified", b"/first"), ("modified", b"/second")]


async def test_mmap_stores_are_seen_at_once(scanner: ChangeScanner, guest: Guest) -> None:
    (guest.root / "mapped").write_bytes(bytes(1 << 20))
    await scanner.baseline(guest.target)
    with (guest.root / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 1 << 20) as memory:
        memory[0] = 1
        assert await changes(scanner, guest) == [("modified", b"/mapped")]
        memory.flush()  # as the kernel does by itself after some seconds: until then a dirty page takes stores unseen
        memory[0] = 2
        assert await changes(scanner, guest) == [("modified", b"/mapped")]
    assert await changes(scanner, guest) == []


async def test_writes_through_an_open_descriptor_are_seen_without_a_close(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    with (guest.root / "log").open("wb", buffering=0) as file:
        file.write(b"1")
        assert await changes(scanner, guest) == [("created", b"/log")]
        for _ in range(20):  # the same size every time: only the clock tells
            file.seek(0)
            file.write(b"2")
            assert await changes(scanner, guest) == [("modified", b"/log")]


async def test_the_kernel_tells_that_nothing_changed(scanner: ChangeScanner, guest: Guest) -> None:
    if not scanner.watch(guest.target.upper):
        pytest.skip("this kernel has no perf counters of ext4's trace points")
    (guest.root / "file").write_bytes(bytes(4096))
    await scanner.baseline(guest.target)
    assert await changes(scanner, guest) == []  # the baseline was written to the same disk, so this one scans
    unscanned = await scanner.changes(guest.target, result=guest.next_result())
    assert unscanned.scanned_entries == 0
    file = guest.root / "file"
    with file.open("r+b", buffering=0) as opened, mmap.mmap(opened.fileno(), 4096) as memory:
        steps: list[Callable[[], object]] = [
            lambda: opened.write(b"1"),
            file.touch,
            lambda: file.chmod(0o600),
            lambda: os.chown(file, 1, 1),
            lambda: file.rename(guest.root / "away"),
            lambda: (guest.root / "away").rename(file),
            memory.flush,
            lambda: memory.__setitem__(0, 7),
            (guest.root / "top").unlink,
            lambda: shutil.rmtree(guest.root / "usr"),
            lambda: (guest.root / "link").symlink_to("x"),
        ]
        for step in steps:
            step()
            found = await scanner.changes(guest.target, result=guest.next_result())
            assert (found.total > 0) == (step != memory.flush)
            while (await scanner.changes(guest.target, result=guest.next_result())).scanned_entries:
                pass
    scanner.unwatch(guest.target.upper)
    assert (await scanner.changes(guest.target, result=guest.next_result())).scanned_entries > 0


async def test_fifos_sockets_and_directories_are_not_listed(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    os.mkfifo(guest.root / "fifo")
    (guest.root / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        directory = os.open(guest.root, os.O_PATH)
        unix.bind(f"/proc/self/fd/{directory}/socket")  # a socket's path has at most 107 bytes
        os.close(directory)
    (guest.root / "top").unlink()
    os.mkfifo(guest.root / "top")
    assert await changes(scanner, guest) == [("deleted", b"/top")]
    assert await changes(scanner, guest) == []


async def test_mounts_and_volumes_are_outside(scanner: ChangeScanner, guest: Guest) -> None:
    guest.excluded = ("/data/volume",)
    await scanner.baseline(guest.target)
    for path in ("proc/x", "sys/x", "dev/x", "run/x", ".innkeeper/x", "data/volume/x", "data/volume-2/x", "running"):
        (guest.root / path).parent.mkdir(parents=True, exist_ok=True)
        (guest.root / path).touch()
    assert await changes(scanner, guest) == [("created", b"/data/volume-2/x"), ("created", b"/running")]
    guest.excluded = ("/data",)  # a volume that is mounted later hides what was there, and is no deletion
    assert await changes(scanner, guest) == []


async def test_layers_of_older_guests(scanner: ChangeScanner, store: Store) -> None:
    with new_guest(store) as older:
        (older.root / "etc/passwd").unlink()
        shutil.rmtree(older.root / "usr/lib")
        (older.root / "usr/lib").mkdir()
        (older.root / "usr/lib/snapshotted").write_text("s")
    with new_guest(store, older.target.upper) as guest:
        await scanner.baseline(guest.target)
        (guest.root / "etc/passwd").touch()
        shutil.rmtree(guest.root / "usr")
        shutil.rmtree(guest.root / "etc/ssl")
        assert await changes(scanner, guest) == [
            ("created", b"/etc/passwd"),
            ("deleted", b"/etc/ssl/certs/ca.pem"),
            ("deleted", b"/usr/lib/snapshotted"),
        ]


async def test_a_tree_as_deep_as_a_path_can_be_and_deeper(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    start = os.open(guest.root, os.O_RDONLY)
    fd = os.dup(start)
    for depth in range(2500):
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd)) if depth % 10 == 0 else None
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    os.close(start)
    found = await changes(scanner, guest)
    assert len(found) == 205  # paths of up to 4,095 bytes
    assert await changes(scanner, guest) == []
    run("rm", "-rf", guest.root / "d", guest.root / "f")
    assert len(await changes(scanner, guest)) == 205
