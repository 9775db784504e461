"""`POST .../command`: what it runs, what it answers, and when."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import pytest
from server_fixture import Api, Room, Server, until

pytestmark = pytest.mark.microvms


def test_the_answer_has_all_documented_fields(room: Room) -> None:
    # It makes the room, because there is none yet.
    answer = room.run("echo out; echo err >&2; echo out again")
    assert list(answer) == ["instance_id", "command", "result", "status"]
    assert answer["instance_id"] == room.create()["instance_id"]
    assert (answer["command"], answer["status"]) == ("echo out; echo err >&2; echo out again", "success")
    result = answer["result"]
    assert (result["output"], result["exit_code"], result["files_changed"]) == ("out\nerr\nout again", 0, [])
    assert UUID(result["execution_id"]) and result["output_truncated"] is False


def test_stdout_and_stderr_are_merged_in_order(shared: Room) -> None:
    line = "for i in 1 2 3 4 5; do echo out$i; echo err$i >&2; done"
    assert shared.output(line).split() == [f"{kind}{i}" for i in range(1, 6) for kind in ("out", "err")]


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("printf 'a'", "a"),
        ("printf 'a\\n'", "a"),
        ("printf 'a\\n\\n'", "a\n"),
        ("printf '\\n'", ""),
        ("printf 'a\\r\\n'", "a\r"),
        ("true", ""),
        ("printf ' a '", " a "),
    ],
)
def test_exactly_one_trailing_newline_is_removed(shared: Room, command: str, output: str) -> None:
    assert shared.output(command) == output


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [
        ("true", 0),
        ("false", 1),
        ("exit 42", 42),
        ("exit 255", 255),
        ("no-such-program", 127),
        ("/etc/passwd", 126),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        ("bash -c 'kill -SEGV $$'", 139),
        ("echo 'unfinished", 2),
    ],
)
def test_exit_codes_and_signals(shared: Room, command: str, exit_code: int) -> None:
    answer = shared.run(command)
    assert answer["result"]["exit_code"] == exit_code, answer
    assert answer["status"] == ("success" if exit_code == 0 else "error")


def test_the_users_login_environment_and_home(shared: Room) -> None:
    assert shared.output("whoami; pwd; echo $HOME; echo $SHELL; id -u").split() == [
        "user",
        "/home/user",
        "/home/user",
        "/bin/bash",
        "1000",
    ]
    assert "/home/user/.local/bin" in shared.output("echo $PATH").split(":")
    assert shared.output("sudo id -u") == "0"


def test_a_changed_profile_file_reaches_the_next_command(room: Room) -> None:
    room.output("echo 'export FROM_PROFILE=yes' >> ~/.profile")
    assert room.output("echo $FROM_PROFILE") == "yes"


def test_shell_variables_and_the_working_directory_do_not_stay(shared: Room) -> None:
    shared.output("cd /tmp; export STAYED=yes")
    assert shared.output("pwd; echo ${STAYED-no}") == "/home/user\nno"


def test_our_extras(shared: Room) -> None:
    assert shared.output("pwd", cwd="/usr/share") == "/usr/share"
    assert shared.output("echo $ONE-$TWO", env={"ONE": "1", "TWO": "zwei – 2"}) == "1-zwei – 2"
    assert shared.output("cat", stdin="no newline at the end: ü") == "no newline at the end: ü"
    assert shared.output("wc -c", stdin="x" * 3_000_000) == "3000000"
    assert shared.output("cat; echo over") == "over"
    nowhere = shared.post("pwd", cwd="/nowhere")
    assert (nowhere.status_code, "/nowhere" in nowhere.json()["message"]) == (400, True), nowhere.text


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"command": ""},
        {"command": None},
        {"command": 5},
        {"command": ["ls"]},
        {"command": "a\0b"},
        {"command": "ls", "unknown": 1},
        {"command": "ls", "timeout": 0},
        {"command": "ls", "timeout": 3601},
        {"command": "ls", "timeout": "5"},
        {"command": "ls", "cwd": 1},
        {"command": "ls", "env": {"A": 1}},
        {"command": "ls", "env": {"A=B": "1"}},
        {"command": "ls", "stdin": 7},
        [],
        "ls",
    ],
    ids=str,
)
def test_what_is_no_command_is_refused(shared: Room, body: object) -> None:
    answer = shared.client.post(f"{shared.path}/command", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"] == "invalid_request" and set(answer.json()) == {"error", "message"}


def test_a_timeout_kills_the_process_group_and_keeps_the_output_so_far(shared: Room) -> None:
    began = time.monotonic()
    answer = shared.run("echo before; sleep 300 & sleep 300; echo after", timeout=2)
    assert time.monotonic() - began < 60
    assert (answer["status"], answer["result"]["exit_code"], answer["result"]["output"]) == ("error", 124, "before")
    assert shared.run("pgrep -x sleep")["result"]["exit_code"] == 1


def test_the_profiles_own_timeout_holds_where_the_request_says_none(api: Api) -> None:
    room = api.room(api.make_profile(command_timeout_seconds=1))
    assert room.run("sleep 60")["result"]["exit_code"] == 124
    assert room.run("sleep 1.5", timeout=20)["result"]["exit_code"] == 0
    room.delete()


@pytest.mark.parametrize("command", ["nohup sleep 100 &", "sleep 100 & echo started", "(sleep 100; echo late) &"])
def test_it_answers_when_the_shell_exits_and_the_background_lives_on(room: Room, command: str) -> None:
    began = time.monotonic()
    assert room.run(command)["result"]["exit_code"] == 0
    assert time.monotonic() - began < 60
    assert room.run("pgrep -x sleep")["result"]["exit_code"] == 0


def test_a_screen_session_survives_its_command(room: Room) -> None:
    room.output("screen -dmS long bash -c 'echo at work > progress.txt; sleep 100'")
    assert "long" in room.run("sleep 0.5; screen -ls")["result"]["output"]
    assert room.output("cat progress.txt") == "at work"


def test_a_long_output_is_cut_and_can_be_read_on(shared: Room) -> None:
    answer = shared.run("seq 1 300000")["result"]
    whole = "".join(f"{n}\n" for n in range(1, 300_001))
    assert answer["output_truncated"] is True and len(answer["output"]) == 1 << 20
    assert whole.startswith(answer["output"])
    text, offset = "", 0
    while True:
        url = f"{shared.path}/command/{answer['execution_id']}/output"
        piece = shared.client.get(url, params={"offset": offset}).json()
        assert (piece["offset"], piece["total_bytes"], piece["gap"]) == (offset, len(whole), None)
        text += piece["output"]
        if piece["next_offset"] == piece["total_bytes"]:
            break
        assert piece["next_offset"] > offset
        offset = piece["next_offset"]
    assert text == whole and piece["ended"] is True and piece["exit_code"] == 0


def test_the_journal_keeps_the_first_16_and_the_last_48_mebibytes(room: Room) -> None:
    mebibyte = 1 << 20
    execution = room.run(f"head -c {80 * mebibyte} /dev/zero | tr '\\0' x; echo end", timeout=120)["result"]
    assert execution["output_truncated"] is True
    url = f"{room.path}/command/{execution['execution_id']}/output"
    first = room.client.get(url, params={"offset": 15 * mebibyte}).json()
    assert first["total_bytes"] == 80 * mebibyte + 4
    gap = room.client.get(url, params={"offset": 20 * mebibyte}).json()
    assert gap["gap"]["from"] == 16 * mebibyte and gap["offset"] == gap["gap"]["to"] > 20 * mebibyte
    assert 80 * mebibyte + 4 - gap["gap"]["to"] <= 48 * mebibyte
    last = room.client.get(url, params={"offset": 80 * mebibyte - 2}).json()
    assert last["output"] == "xxend\n"


def test_an_execution_that_is_not_there(shared: Room) -> None:
    for leaf in ("output", "files_changed"):
        for name in ("5f9d3fb0-0000-4000-8000-000000000000", "nonsense"):
            answer = shared.client.get(f"{shared.path}/command/{name}/{leaf}")
            assert answer.status_code == 404 and set(answer.json()) == {"error", "message"}


def test_invalid_utf8_is_replaced(shared: Room) -> None:
    assert shared.output(r"printf 'a\xffb\xc3'") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    assert shared.output(r"printf 'NUL:\0:end'") == "NUL:\0:end"


def test_commands_of_one_room_run_at_the_same_time(shared: Room) -> None:
    shared.output("rm -f /tmp/fifo; mkfifo /tmp/fifo")
    with ThreadPoolExecutor(2) as two:
        reading = two.submit(shared.output, "cat /tmp/fifo", timeout=30)
        assert shared.output("echo across > /tmp/fifo", timeout=30) == ""
        assert reading.result() == "across"


def test_many_commands_at_once_are_all_answered(shared: Room) -> None:
    with ThreadPoolExecutor(20) as many:
        said = list(many.map(lambda n: shared.output(f"echo {n}"), range(60)))
    assert said == [str(n) for n in range(60)]


def test_a_frozen_room_answers(innkeeper: Server, room: Room) -> None:
    instance = room.create()["instance_id"]
    assert room.output("echo before") == "before"
    machine = innkeeper.machine_of(instance)
    # Each driver has a group of its own in the server's name.
    group = f"innkeeper-{innkeeper.server_id}*/{machine}"
    states = list(Path("/sys/fs/cgroup").glob(f"**/{group}/freezer.state"))
    states += list(Path("/sys/fs/cgroup").glob(f"**/{group}/cgroup.freeze"))
    assert states, f"no freezer of {machine}"
    until(lambda: states[0].read_text().strip() in ("FROZEN", "1"), seconds=20)
    began = time.monotonic()
    assert room.output("echo awake") == "awake"
    assert time.monotonic() - began < 30
