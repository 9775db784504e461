"""The change scanner on real overlays: ext4 on a loop device above, EROFS and an older upper directory below."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from innkeeper.host.change_scanner import ChangeScanError, ChangeScanner, FileChange, ScanTarget, read_changes

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root"),
    pytest.mark.skipif(shutil.which("go") is None, reason="the agent is built with go"),
]

SCANNER_UID = 64123
OVERLAY_OPTIONS = "userxattr,redirect_dir=nofollow,metacopy=off,index=off"


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=120)


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("agent") / "inn-agent"
    source = Path(__file__).parents[2] / "guest"
    subprocess.run(["go", "build", "-o", binary, "."], cwd=source, env={**os.environ, "CGO_ENABLED": "0"}, check=True)
    return binary


@dataclass
class Store:
    """Where the guests of one test module live."""

    disk: Path
    image: Path
    guests: int = 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    root = tmp_path_factory.mktemp("store")
    tree = root / "tree"
    for path in ("etc/ssl/certs/ca.pem", "etc/passwd", "usr/lib/x/one", "usr/lib/x/two", "usr/lib/y/three", "top"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(path.encode() * 3)
    (tree / "etc/link").symlink_to("passwd")
    (tree / "tmp").mkdir()
    for volatile in ("proc", "run", "dev", "sys"):
        (tree / volatile).mkdir()
    with contextlib.ExitStack() as stack:
        run("mkfs.erofs", "--quiet", root / "image.erofs", tree)
        store = Store(root / "disk", root / "image")
        store.disk.mkdir()
        store.image.mkdir()
        run("mount", "-t", "erofs", "-o", "loop,ro", root / "image.erofs", store.image)
        stack.callback(run, "umount", store.image)
        run("truncate", "-s", "2G", root / "disk.img")
        run("mkfs.ext4", "-q", "-N", "150000", root / "disk.img")
        run("mount", "-o", "loop,noatime,nodev", root / "disk.img", store.disk)
        stack.callback(run, "umount", store.disk)
        yield store


@dataclass
class Guest:
    """The files of one guest, changed by native processes through the merged mount."""

    home: Path
    lowers: tuple[Path, ...]
    excluded: tuple[str, ...] = ()
    commands: int = field(default=0)

    @property
    def root(self) -> Path:
        return self.home / "merged"

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def target(self) -> ScanTarget:
        return ScanTarget(self.home / "upper", self.lowers, self.state / "baseline", self.excluded)

    def next_result(self) -> Path:
        self.commands += 1
        return self.state / f"result-{self.commands}"

    def mount(self) -> None:
        for name in ("upper", "work", "merged", "state"):
            (self.home / name).mkdir(parents=True)
        os.chown(self.state, SCANNER_UID, SCANNER_UID)
        lowers = ":".join(str(lower) for lower in self.lowers)
        options = f"lowerdir={lowers},upperdir={self.home}/upper,workdir={self.home}/work,{OVERLAY_OPTIONS}"
        run("mount", "-t", "overlay", "-o", options, "overlay", self.root)

    def unmount(self) -> None:
        run("umount", self.root)


@contextlib.contextmanager
def new_guest(store: Store, *lowers: Path) -> Iterator[Guest]:
    store.guests += 1
    guest = Guest(store.disk / f"guest-{store.guests}", (*lowers, store.image))
    guest.mount()
    try:
        yield guest
    finally:
        guest.unmount()


@pytest.fixture
def guest(store: Store) -> Iterator[Guest]:
    with new_guest(store) as guest:
        yield guest


@pytest.fixture
async def scanner(agent: Path) -> AsyncIterator[ChangeScanner]:
    async with ChangeScanner.start(agent, uid=SCANNER_UID, gid=SCANNER_UID) as scanner:
        yield scanner


def process_status(scanner: ChangeScanner) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{scanner.pid}/status").read_text().splitlines())


def kill(pid: int) -> None:
    """Kill a process and wait for its end."""
    with contextlib.closing(os.fdopen(os.pidfd_open(pid))) as process:
        os.kill(pid, signal.SIGKILL)
        select.select([process], [], [], 5)


async def changes(scanner: ChangeScanner, guest: Guest) -> list[tuple[str, bytes]]:
    found = await scanner.changes(guest.target, result=guest.next_result(), limit=1_000_000)
    assert found.total == len(found.rows)
    return [(row.status, row.path) for row in found.rows]


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


async def test_pages_of_a_long_result(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    (guest.root / "many").mkdir()
    for number in range(2500):
        (guest.root / f"many/{number:04}").touch()
    result = guest.next_result()
    found = await scanner.changes(guest.target, result=result)
    assert (found.total, len(found.rows)) == (2500, 1000)
    rows: list[FileChange] = []
    cursor: int | None = 0
    while cursor is not None:
        page, cursor = read_changes(result, cursor, 700)
        rows += page
    assert [row.path for row in rows] == [f"/many/{number:04}".encode() for number in range(2500)]
    assert rows[:1000] == list(found.rows)


async def test_a_repeated_request_gives_the_same_rows(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    (guest.root / "new").touch()
    result = guest.next_result()
    first = await scanner.changes(guest.target, result=result)
    (guest.root / "later").touch()
    assert (await scanner.changes(guest.target, result=result)).rows == first.rows
    assert await changes(scanner, guest) == [("created", b"/later")]


async def test_many_commands_of_one_guest_report_a_change_once(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    for number in range(50):
        (guest.root / f"new-{number}").touch()
    found = await asyncio.gather(*(changes(scanner, guest) for _ in range(10)))
    assert sorted(len(rows) for rows in found) == [0] * 9 + [50]


async def test_without_a_baseline(scanner: ChangeScanner, guest: Guest) -> None:
    with pytest.raises(ChangeScanError) as failure:
        await changes(scanner, guest)
    assert failure.value.code == "no_baseline"
    await scanner.baseline(guest.target)
    guest.target.baseline.write_bytes(guest.target.baseline.read_bytes()[:-3])
    with pytest.raises(ChangeScanError) as failure:
        await changes(scanner, guest)
    assert failure.value.code == "bad_baseline"


async def test_an_overlay_whose_marks_cannot_be_read_is_refused(scanner: ChangeScanner, store: Store) -> None:
    store.guests += 1
    guest = Guest(store.disk / f"guest-{store.guests}", (store.image,))
    guest.mount()
    guest.unmount()
    options = f"lowerdir={store.image},upperdir={guest.home}/upper,workdir={guest.home}/work"
    run("mount", "-t", "overlay", "-o", options, "overlay", guest.root)
    try:
        with pytest.raises(ChangeScanError) as failure:
            await scanner.baseline(guest.target)
    finally:
        guest.unmount()
    assert failure.value.code == "unsupported_mount"


async def test_the_process_holds_one_capability(scanner: ChangeScanner) -> None:
    status = process_status(scanner)
    only_dac_read_search = f"{1 << 2:016x}"
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert status[name] == only_dac_read_search
    assert status["NoNewPrivs"] == "1"
    assert status["Uid"].split() == [str(SCANNER_UID)] * 4
    assert status["Groups"].strip() == ""


async def test_a_private_directory_is_seen(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    (guest.root / "root").mkdir(mode=0o700)
    (guest.root / "root/.secret").touch(mode=0o000)
    assert await changes(scanner, guest) == [("created", b"/root/.secret")]


async def test_killed_at_any_moment_nothing_is_lost_or_repeated(scanner: ChangeScanner, guest: Guest) -> None:
    (guest.root / "tree").mkdir()
    for number in range(5000):
        (guest.root / f"tree/{number}").touch()
    await scanner.baseline(guest.target)
    reported: list[bytes] = []
    killed = 0
    for attempt in range(40):
        for part in range(20):
            (guest.root / f"new-{attempt:02}-{part}").touch()
        result = guest.next_result()
        request = asyncio.create_task(scanner.changes(guest.target, result=result))
        await asyncio.sleep(attempt * 0.0005)
        if scanner.pid is not None and not request.done():
            kill(scanner.pid)
        try:
            await request
        except ChangeScanError as failure:
            assert failure.code == "scanner_died"
            killed += 1
            assert scanner.pid is None
            if attempt % 2:  # ask again, or leave it to the next command
                await scanner.changes(guest.target, result=result)
    await scanner.changes(guest.target, result=guest.next_result())
    for command in range(1, guest.commands + 1):
        with contextlib.suppress(FileNotFoundError):
            rows, _ = read_changes(guest.state / f"result-{command}", 0, 1_000_000)
            reported += [row.path for row in rows]
    assert killed > 5
    assert sorted(reported) == sorted(f"/new-{a:02}-{p}".encode() for a in range(40) for p in range(20))
    assert {path.name for path in guest.state.iterdir() if not path.name.startswith("result-")} == {"baseline"}


async def test_a_guest_that_changes_everything_meanwhile(scanner: ChangeScanner, guest: Guest) -> None:
    await scanner.baseline(guest.target)
    body = "mkdir -p a/b/c; touch a/b/c/1 a/2; mv a/b d; ln -s / a/b; rm -rf a; mv d a; rm -rf a"
    script = f'cd "$0"; while :; do {body}; done'
    process = await asyncio.create_subprocess_exec("sh", "-c", script, guest.root, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            await changes(scanner, guest)
    finally:
        process.kill()
        await process.wait()
    run("rm", "-rf", guest.root / "a", guest.root / "d")
    await changes(scanner, guest)
    (guest.root / "after").touch()
    assert await changes(scanner, guest) == [("created", b"/after")]


async def test_a_file_that_no_scanner_wrote_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a result at all, but long enough")
    (tmp_path / "link").symlink_to("text")
    os.mkfifo(tmp_path / "fifo")
    for name, error in (("text", ValueError), ("link", OSError), ("fifo", ValueError), ("none", FileNotFoundError)):
        with pytest.raises(error):
            read_changes(tmp_path / name, 0, 10)
