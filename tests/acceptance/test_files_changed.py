"""`files_changed`: which files a command changed, each case as the design promises it."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from server_fixture import Room

HOME = "/home/user"


def test_every_row_has_its_fields(room: Room) -> None:
    answer = room.run("mkdir -p deep/er && echo hello > deep/er/note.txt && rm ~/.bash_logout")
    instance = answer["instance_id"]
    assert answer["result"]["files_changed"] == [
        {"path": f"{HOME}/.bash_logout", "status": "deleted", "size": 0, "mime_type": None, "public_url": None},
        {
            "path": f"{HOME}/deep/er/note.txt",
            "status": "created",
            "size": 6,
            "mime_type": "text/plain",
            "public_url": f"/vm/{instance}/file{HOME}/deep/er/note.txt",
        },
    ]


# (what prepares, the command, what it changed)
CASES = {
    "created": ("true", "echo 1 > a", {"a": "created"}),
    "modified": ("echo 1 > a", "echo 2 >> a", {"a": "modified"}),
    "deleted": ("echo 1 > a", "rm a", {"a": "deleted"}),
    "nothing": ("echo 1 > a", "cat a; ls -l", {}),
    "made and deleted": ("true", "echo 1 > a; rm a", {}),
    "touched": ("echo 1 > a; sleep 0.1", "touch a", {"a": "modified"}),
    "mode only": ("echo 1 > a", "chmod 600 a", {"a": "modified"}),
    "owner only": ("echo 1 > a", "sudo chown root a", {"a": "modified"}),
    "rename": ("echo 1 > a", "mv a b", {"a": "deleted", "b": "created"}),
    "rename over a file": ("echo 1 > a; echo 22 > b", "mv a b", {"a": "deleted", "b": "modified"}),
    "a file becomes a directory": ("echo 1 > a", "rm a; mkdir a; echo 1 > a/b", {"a": "deleted", "a/b": "created"}),
    "a directory becomes a file": ("mkdir a; echo 1 > a/b", "rm -r a; echo 1 > a", {"a/b": "deleted", "a": "created"}),
    "symlink": ("true", "ln -s /etc/passwd a", {"a": "created"}),
    "symlink to a directory is not followed": ("mkdir d; echo 1 > d/x", "ln -s d a", {"a": "created"}),
    "hard link": ("echo 1 > a", "ln a b", {"a": "modified", "b": "created"}),
    "sparse": ("true", "truncate -s 1G a", {"a": "created"}),
    "mapped memory": (
        "head -c 4096 /dev/zero > a",
        """python -c 'import mmap; f = open("a", "r+b"); m = mmap.mmap(f.fileno(), 0); m[0] = 1; m.flush()'""",
        {"a": "modified"},
    ),
    "empty directories are not listed": ("true", "mkdir -p a/b/c", {}),
    "kernel files": ("true", "echo x > /dev/null; echo 1 > /dev/shm/a", {}),
    "a name with a newline and a quote": ("true", "touch \"$(printf 'a\\n\\047b')\"", {"a\n'b": "created"}),
}


@pytest.mark.parametrize("case", CASES)
def test_case(shared: Room, case: str) -> None:
    before, command, expected = CASES[case]
    folder = f"{HOME}/{abs(hash(case))}"
    shared.output(f"mkdir {folder} && cd {folder} && {{ {before}; }}")
    found = shared.changes(f"cd {folder} && {{ {command}; }}")
    if case == "hard link":
        # Whether the first name counts as changed (its link count did) is the file system's business.
        found.setdefault(f"{folder}/a", "modified")
    assert found == {f"{folder}/{name}": status for name, status in expected.items()}


def test_files_of_the_image(room: Room) -> None:
    assert room.changes("sudo sh -c 'echo more >> /etc/hostname.txt; echo x >> /etc/issue'") == {
        "/etc/hostname.txt": "created",
        "/etc/issue": "modified",
    }
    # Opened for writing, so copied up, and yet the same.
    assert room.changes("sudo sh -c ': >> /etc/issue.net'") == {}
    inside = room.output("find /usr/share/doc/bash -type f -o -type l -path '/usr/share/doc/bash/*' | sort").split()
    assert inside and room.changes("sudo rm -r /usr/share/doc/bash") == dict.fromkeys(inside, "deleted")


def test_a_name_that_is_not_utf8(room: Room) -> None:
    answer = room.run(r"printf raw > $'bad\xffname.txt'")
    (row,) = answer["result"]["files_changed"]
    assert row["path"] == f"{HOME}/bad\N{REPLACEMENT CHARACTER}name.txt"
    assert row["public_url"] == f"/vm/{answer['instance_id']}/file{quote(HOME)}/bad%FFname.txt"
    assert room.client.get(row["public_url"]).text == "raw"


def test_every_change_is_reported_once(room: Room) -> None:
    assert room.changes("(sleep 0.5; echo late > late.txt) & echo early > early.txt") == {
        f"{HOME}/early.txt": "created"
    }
    assert room.changes("sleep 1.5") == {f"{HOME}/late.txt": "created"}
    assert room.changes("true") == {}


def test_what_the_api_writes_is_no_commands_change(room: Room) -> None:
    room.create()
    room.output("true")
    assert room.put(f"{HOME}/put.txt", b"content").status_code == 201
    found = room.changes("echo 1 > own.txt")
    assert found[f"{HOME}/own.txt"] == "created"


@pytest.mark.parametrize(
    ("command", "mime_type"),
    [
        ("echo a > a.html", "text/html"),
        ("echo '{}' > a.json", "application/json"),
        ("printf '\\x89PNG\\r\\n\\x1a\\n0000' > picture", "image/png"),
        ("echo text > plain", "text/plain"),
        ("head -c 100 /dev/urandom > noise", "application/octet-stream"),
    ],
)
def test_the_type_is_by_name_or_else_by_content(shared: Room, command: str, mime_type: str) -> None:
    (row,) = shared.run(command)["result"]["files_changed"]
    assert row["mime_type"].partition(";")[0] == mime_type


@pytest.mark.gvisor_only(
    reason="making so many files takes minutes where instructions are translated; VMs scan fewer in other tests"
)
def test_a_hundred_thousand_files(room: Room) -> None:
    make = (
        "import os\nfor d in range(100):\n os.mkdir(f'm{d}')\n for f in range(1000): open(f'm{d}/{f}.txt', 'x').close()"
    )
    room.create()
    assert room.put(f"{HOME}/make.py", make.encode()).status_code == 201
    room.output("true")
    answer = room.run("mkdir many && cd many && python ../make.py", timeout=300)["result"]
    assert answer["exit_code"] == 0, answer["output"]
    assert answer["files_changed_truncated"] is True and answer["files_changed_total"] == 100_000
    assert len(answer["files_changed"]) == 1000
    url = f"{room.path}/command/{answer['execution_id']}/files_changed"
    paths, cursor = [], None
    for _ in range(100):
        page = room.client.get(url, params={} if cursor is None else {"cursor": cursor}).json()
        assert page["files_changed_total"] == 100_000
        paths += [row["path"] for row in page["files_changed"]]
        cursor = page["next_cursor"]
    assert cursor is None and len(set(paths)) == len(paths) == 100_000
    assert room.changes("true") == {}


def test_a_short_list_has_one_page(shared: Room) -> None:
    answer = shared.run("echo 1 > paged.txt")["result"]
    assert (answer["files_changed_truncated"], answer["files_changed_total"]) == (False, 1)
    page = shared.client.get(f"{shared.path}/command/{answer['execution_id']}/files_changed").json()
    assert (page["files_changed"], page["next_cursor"]) == (answer["files_changed"], None)
    refused = shared.client.get(f"{shared.path}/command/{answer['execution_id']}/files_changed?cursor=x")
    assert (refused.status_code, refused.json()["error"]) == (400, "invalid_request")
