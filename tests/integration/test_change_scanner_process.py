"""The scanner as a process: pages, repeated and concurrent requests, refusals, privileges, and being killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from tests.integration.scanned_guest import SCANNER_MARKS, SCANNER_UID, Guest, Store, changes, kill, process_status, run

from innkeeper.host.change_scanner import ChangeScanError, ChangeScanner, FileChange, read_changes

pytestmark = SCANNER_MARKS


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
