"""Ways from a guest, and through a guest's paths, to files of the host: public addresses, the file API, `inn cp`; none leads there."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from guest_side import PROGRAMS
from server_fixture import Api, Room, Server, until

HOME = "/home/user"
SECRET = f"secret of the host {uuid4()}"


@pytest.fixture(scope="module")
def canary() -> Iterator[Path]:
    """A file of the host that everybody on the host may read, so that only the wall keeps it from a guest."""
    path = Path(f"/var/tmp/innkeeper-canary-{os.getpid()}")
    path.write_text(SECRET)
    yield path
    assert path.read_text() == SECRET, "somebody wrote to the host"
    path.unlink()


@pytest.fixture(scope="module")
def open_room(api: Api) -> Iterator[Room]:
    """A room all of whose files are public, as far as its user may read them."""
    made = api.room(api.make_profile(public_files="all"))
    made.create()
    yield made
    made.delete()


@pytest.fixture(scope="module")
def anybody(innkeeper: Server) -> httpx2.Client:
    """A client without a token, that sends paths as they are."""
    return innkeeper.client(token=None)


def raw_get(innkeeper: Server, target: bytes, *, token: str | None = None) -> bytes:
    """The whole answer to a request whose target no library has tidied up."""
    with socket.create_connection(("127.0.0.1", innkeeper.port), timeout=30) as sock:
        bearer = f"Authorization: Bearer {token}\r\n".encode() if token else b""
        sock.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + bearer + b"\r\n")
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return answer


def reported(room: Room, command: str, name: str) -> dict[str, Any]:
    """The row of the file `name` of the home directory among what a command changed."""
    rows = {row["path"]: row for row in room.run(command)["result"]["files_changed"]}
    found: dict[str, Any] = rows[f"{HOME}/{name}"]
    return found


def spellings(canary: Path) -> list[bytes]:
    """Paths that would mean the canary, or a directory above the guest, to somebody who reads them wrongly."""
    plain = os.fsencode(canary)
    up = [b"../" * 12, b"..%2f" * 12, b"%2e%2e/" * 12, b"%2e%2e%2f" * 12, b"..%252f" * 12, b"%c0%ae%c0%ae/" * 12, b"%e0%80%ae%e0%80%ae/" * 12,
          b"..%5c" * 12, b"....//" * 12, b"..;/" * 12, b"%uff0e%uff0e/" * 12, b"./" * 40, b"%2f" * 3]  # fmt: skip
    starts = [b"", b"/", b"//", b"home/user/", b"proc/self/root/", b"proc/1/root/", b"proc/self/cwd/", b"proc/1/cwd/", b"proc/thread-self/root/", b"dev/fd/3/",
              b".innkeeper/link/", b".innkeeper/link/agent.sock/", b".innkeeper/bin/", b"root/"]  # fmt: skip
    made = [start + plain.lstrip(b"/") for start in starts]
    made += [start + step + plain.lstrip(b"/") for start in (b"", b"home/user/", b".innkeeper/link/") for step in up]
    made += [
        plain.lstrip(b"/") + tail
        for tail in (b"%00", b"%00.txt", b"/.", b"//", b"%0a", b"%20", b"?x", b"#x", b";x", b"\x00")
    ]
    made += [b"proc/self/fd/%d" % number for number in range(12)] + [b"proc/1/fd/%d" % number for number in range(12)]
    made += [
        b"proc/self/environ",
        b"proc/1/environ",
        b"proc/self/mem",
        b"proc/kcore",
        b"proc/self/maps",
        b"sys/kernel/notes",
    ]
    return made


def test_no_spelling_of_a_path_is_a_file_of_the_host(open_room: Room, innkeeper: Server, canary: Path) -> None:
    instance = open_room.create()["instance_id"]
    # Control: the way works for a file of the guest that is called as the canary is.
    open_room.put(f"{canary}-of-the-guest", b"of the guest")
    target = f"/vm/{instance}/file{canary}-of-the-guest".encode()
    assert raw_get(innkeeper, target).endswith(b"of the guest")
    for path in spellings(canary):
        for target, token in (
            (f"/vm/{instance}/file/".encode() + path, None),
            (f"{open_room.path}/file/".encode() + path, innkeeper.token),
            (f"{open_room.path}/files/".encode() + path, innkeeper.token),
        ):
            answer = raw_get(innkeeper, target, token=token)
            head, _, body = answer.partition(b"\r\n\r\n")
            status = int(head.split()[1])
            assert SECRET.encode() not in answer and os.fsencode(innkeeper.home) not in answer, target
            assert status < 500, (target, answer[:200])
            if token is None and b"proc/" in path:
                assert status in (404, 400) and b"PATH=" not in body, target


def test_links_out_of_a_guest_end_in_the_guest(
    attacker: Room, anybody: httpx2.Client, canary: Path, innkeeper: Server, tmp_path: Path
) -> None:
    targets = [
        str(canary),
        f"../../../../../..{canary}",
        f"/proc/self/root{canary}",
        f"/proc/1/root{canary}",
        f"/.innkeeper/link/../../..{canary}",
    ]
    made = attacker.run("; ".join(f"ln -sfn '{target}' link{number}" for number, target in enumerate(targets)))
    rows = made["result"]["files_changed"]
    assert len(rows) == len(targets)
    for row in rows:
        assert anybody.get(row["public_url"]).status_code == 404
        assert attacker.file(row["path"]).status_code in (403, 404)
    for row in rows:
        # Writing through it makes a file of the guest, or is refused.
        assert attacker.put(row["path"], b"written").status_code < 500
    done = innkeeper.inn("cp", f"base/{attacker.room_id}:{HOME}", str(tmp_path / "copy"))
    assert done.returncode in (0, 1), done.stderr
    for path in (tmp_path / "copy").rglob("*"):
        assert not path.is_symlink() and path.resolve().is_relative_to(tmp_path)
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()
    attacker.output(f"sudo rm -f {canary}")


def test_what_is_no_file_is_refused_at_once(attacker: Room, anybody: httpx2.Client) -> None:
    script = (
        "mkfifo fifo; ln -sf /dev/zero zero; ln -sf /dev/random random; ln -sf /dev/ptmx ptmx; ln -sf /dev/fuse fuse; ln -sf /dev/tty tty; "
        "ln -sf loop loop; ln -sf /proc/kmsg kmsg; ln -sf /proc/1/mem mem; ln -sf /.innkeeper/link/agent.sock agent; ln -sf /dev/stdin stdin; "
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"socket\")'; ls"
    )
    instance = attacker.run(script)["instance_id"]
    for name in (
        "fifo",
        "zero",
        "random",
        "ptmx",
        "fuse",
        "tty",
        "loop",
        "kmsg",
        "mem",
        "agent",
        "stdin",
        "socket",
        "",
    ):
        began = time.monotonic()
        assert anybody.get(f"/vm/{instance}/file{HOME}/{name}").status_code == 404, name
        assert attacker.file(f"{HOME}/{name}").status_code in (400, 403, 404), name
        assert time.monotonic() - began < 10, name
    assert attacker.put(f"{HOME}/fifo", b"x").status_code < 500
    assert attacker.output("echo alive") == "alive"


def test_a_huge_sparse_file_costs_nothing(attacker: Room, anybody: httpx2.Client, innkeeper: Server) -> None:
    assert innkeeper.process is not None
    row = reported(attacker, "truncate -s 1T sparse.bin", "sparse.bin")
    assert row["size"] == 1 << 40
    assert attacker.file(row["path"]).status_code == 413
    head = anybody.head(row["public_url"])
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(1 << 40))
    part = anybody.get(row["public_url"], headers={"Range": f"bytes={(1 << 40) - 4}-"})
    assert (part.status_code, part.content) == (206, bytes(4))
    resident = Path(f"/proc/{innkeeper.process.pid}/statm").read_text().split()[1]
    for _ in range(3):
        with anybody.stream("GET", row["public_url"]) as answer:
            taken = 0
            for chunk in answer.iter_bytes(1 << 20):
                if (taken := taken + len(chunk)) > 8 << 20:
                    break
    grown = int(Path(f"/proc/{innkeeper.process.pid}/statm").read_text().split()[1]) - int(resident)
    assert grown * os.sysconf("SC_PAGE_SIZE") < 50 << 20
    attacker.output("rm sparse.bin")


def test_hard_links_give_no_right_that_the_user_lacks(attacker: Room, anybody: httpx2.Client) -> None:
    answer = attacker.run("ln /etc/shadow stolen; sudo ln /etc/shadow given; sudo ln /etc/shadow /tmp/given; true")
    rows = {row["path"]: row["public_url"] for row in answer["result"]["files_changed"]}
    assert f"{HOME}/given" in rows, "the attempt links at all"
    for path, url in rows.items():
        assert anybody.get(url).status_code == 404, path


def test_a_path_that_changes_while_it_is_read_shows_one_thing_or_nothing(
    attacker: Room, anybody: httpx2.Client, canary: Path
) -> None:
    attacker.put("/tmp/swap.py", (PROGRAMS / "swap.py").read_bytes())
    row = reported(attacker, "echo harmless > target.txt", "target.txt")
    targets = f"/proc/1/environ /proc/self/environ /etc/shadow /dev/zero {canary} /.innkeeper/link/agent.sock"
    attacker.output(f"(nohup python3 /tmp/swap.py {row['path']} {targets} > /dev/null 2>&1 &)")
    until(lambda: attacker.run(f"test -e {row['path']}.made")["result"]["exit_code"] == 0)
    seen: dict[str, int] = {}
    for _ in range(250):
        answer = anybody.get(row["public_url"])
        seen[f"{answer.status_code} {answer.text[:8] if answer.status_code == 200 else ''}".strip()] = (
            seen.get(str(answer.status_code), 0) + 1
        )
        assert answer.status_code in (200, 404), answer.text
        assert answer.status_code == 404 or answer.text.strip() == "harmless", answer.text[:200]
    attacker.output(f"touch {row['path']}.stop")
    print(f"250 reads of a path that changes all the time: {sorted(seen)}")
    assert any(name.startswith("200") for name in seen), "sometimes it is the file"


@pytest.mark.gvisor_only(reason="the host never mounts a microVM's disk")
def test_nothing_of_a_guests_disk_means_anything_on_the_host(attacker: Room, innkeeper: Server) -> None:
    attacker.output(
        "sudo cp /usr/bin/id /tmp/suid; sudo chmod 4755 /tmp/suid; sudo mknod /tmp/disk b 7 0; sudo mknod /tmp/white c 0 0; sudo mknod /tmp/null c 1 3; "
        "sudo setcap cap_sys_admin+ep /tmp/suid; sudo chattr +i /tmp/suid; "
        "for name in user.overlay.opaque user.overlay.redirect user.overlay.metacopy user.overlay.whiteout trusted.overlay.opaque "
        "trusted.overlay.redirect trusted.overlay.metacopy security.capability security.selinux system.posix_acl_access user.plain; do "
        "sudo python3 -c \"import os; os.setxattr('/tmp', '$name', b'y')\"; "
        "sudo python3 -c \"import os; os.setxattr('/tmp/suid', '$name', b'y')\"; done 2> /dev/null; true"
    )
    machine = innkeeper.machine_of(attacker.create()["instance_id"])
    upper = innkeeper.home / "host" / "mounts" / "machines" / machine / "disk" / "u"
    assert (upper / "tmp" / "suid").stat().st_mode & stat.S_ISUID, "the attempt arrives on the host's disk"
    for path in (upper / "tmp", upper / "tmp" / "suid"):
        # What overlay itself writes there is an origin, an impure mark or the like; never what a guest chose.
        written = {name: os.getxattr(path, name) for name in os.listxattr(path)}
        assert b"y" not in [value for name, value in written.items() if name != "user.overlay.impure"], written
    devices = [
        path
        for path in (upper / "tmp").iterdir()
        if stat.S_ISBLK(path.lstat().st_mode) or stat.S_ISCHR(path.lstat().st_mode)
    ]
    assert devices == []
    options = next(
        line.split()[3]
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[1] == str(upper.parent)
    )
    assert {"nosuid", "nodev"} <= set(options.split(","))
    assert attacker.output("echo alive") == "alive"
