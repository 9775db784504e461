import pytest

from innkeeper.host.linux import command

pytestmark = pytest.mark.anyio


async def test_output_input_and_environment() -> None:
    completed = await command.run(["sh", "-c", "cat; env; echo oops >&2"], stdin=b"in\n", env={"A": "b"})
    assert completed.stdout.startswith(b"in\n")
    assert b"A=b\n" in completed.stdout
    assert b"HOME=" not in completed.stdout
    assert completed.stderr == b"oops\n"


async def test_the_default_environment_is_small() -> None:
    completed = await command.run(["/usr/bin/env"])
    assert sorted(line.split(b"=")[0] for line in completed.stdout.splitlines()) == [b"LANG", b"PATH"]


async def test_a_failure_carries_the_end_of_stderr_and_tells_users_nothing() -> None:
    with pytest.raises(command.CommandFailed) as failure:
        await command.run(["sh", "-c", "yes error | head -c 100000 >&2; echo the end >&2; exit 3"])
    assert failure.value.code == "command_failed"
    assert failure.value.returncode == 3
    assert failure.value.stderr_tail.endswith("the end")
    assert len(failure.value.stderr_tail) <= command.STDERR_TAIL_BYTES
    assert "exit status 3" in str(failure.value)
    assert failure.value.message == "A command on the host failed."


async def test_users_are_told_of_a_full_disk() -> None:
    with pytest.raises(command.CommandFailed) as failure:
        await command.run(["dd", "if=/dev/zero", "of=/dev/full", "count=1"])
    assert failure.value.message == "A command on the host failed: its disk is full."


async def test_a_failure_may_be_an_answer() -> None:
    assert (await command.run(["false"], check=False)).returncode == 1
    assert (await command.run(["sh", "-c", "kill -TERM $$"], check=False)).returncode == -15


async def test_a_command_that_does_not_exist() -> None:
    with pytest.raises(command.CommandFailed, match="cannot start") as failure:
        await command.run(["/nonexistent/command"], check=False)
    assert failure.value.returncode is None
    assert not command.own_children.spawning


async def test_a_deadline() -> None:
    with pytest.raises(command.CommandTimedOut) as failure:
        await command.run(["sleep", "10"], timeout_seconds=0.05)
    assert failure.value.code == "command_timed_out"


async def test_a_child_is_ours_until_it_is_collected() -> None:
    process = await command.spawn(["sleep", "10"])
    assert process.pid in command.own_children
    await command.end(process)
    await command.end(process)
    assert process.pid not in command.own_children
    assert process.returncode == -9


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (1, "exit status 1"),
        (127, "exit status 127 (command not found)"),
        (-9, "killed by SIGKILL"),
        (-63, "killed by signal 63"),
    ],
)
def test_statuses_in_words(status: int, sentence: str) -> None:
    assert command.describe_status(status) == sentence
