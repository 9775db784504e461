"""Commands over the bus, in real guests: exit status, output, limits, background work, input, and journals."""

import asyncio
import hashlib
import time
from uuid import UUID, uuid4

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually

from innkeeper.bus.contract import Data
from innkeeper.core import host_verbs as verbs
from innkeeper.core.host_verbs import to_wire
from innkeeper.errors import (
    ConflictError,
    ExecutionNotFoundError,
    InnkeeperError,
    InstanceNotFoundError,
    InvalidRequestError,
)

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

MIB = 1_048_576
HEAD = 16 * MIB
TAIL = 48 * MIB


@pytest.mark.parametrize(
    ("command", "exit_code", "output"),
    [
        ("true", 0, ""),
        ("false", 1, ""),
        ("exit 42", 42, ""),
        ("no-such-program", 127, "bash: line 1: no-such-program: command not found\n"),
        ("/etc/passwd", 126, "bash: line 1: /etc/passwd: Permission denied\n"),
        ("if", 2, None),
        ("kill -TERM $$", 143, ""),
        ("kill -KILL $$", 137, ""),
        ("sh -c 'kill -INT $$'; echo $?", 0, "130\n"),
        ("python3 -c 'import os; os.abort()'", 134, None),
        ("echo $0 $# $SHLVL; pwd; whoami; echo $HOME", 0, None),
        ("printf 'no newline'", 0, "no newline"),
        ("printf '\\377\\000x'", 0, None),
        ("cat", 0, ""),
        ("for i in 1 2 3; do echo o$i; echo e$i >&2; done", 0, "o1\ne1\no2\ne2\no3\ne3\n"),
        ("python3 -c 'import sys; print(1, flush=True); print(2, file=sys.stderr); print(3)'", 0, "1\n2\n3\n"),
    ],
)
async def test_a_command_ends_as_in_a_shell(
    host: Host, shared: UUID, command: str, exit_code: int, output: str | None
) -> None:
    answer = await host.run(shared, command)
    assert answer.exit_code == exit_code, answer
    if output is not None:
        assert answer.text == output
    assert answer.body["output_bytes"] == len(answer.output)
    assert not answer.body["output_truncated"]


@pytest.fixture(scope="module")
async def shared(host: Host) -> UUID:
    """An instance for tests that leave nothing in it."""
    return await host.ensure(env={"FROM_PROFILE": "profile", "BOTH": "profile"})


async def test_the_signal_is_told_and_so_are_bytes_as_they_are(host: Host, shared: UUID) -> None:
    assert (await host.run(shared, "kill -SEGV $$")).body["signal"] == 11
    assert (await host.run(shared, "printf '\\377\\000x'")).output == b"\xff\x00x"


async def test_environment_directory_and_input(host: Host, shared: UUID) -> None:
    answer = await host.ok(
        shared,
        'echo "$FROM_PROFILE $BOTH $MINE"; pwd; id -un; cat',
        cwd="/usr/share",
        env={"BOTH": "command", "MINE": "a b'\"$"},
        stdin=b"typed\n",
    )
    assert answer.text == "profile command a b'\"$\n/usr/share\nuser\ntyped\n"
    assert (await host.run(shared, "pwd")).text == "/home/user\n"
    with pytest.raises(InnkeeperError):
        await host.run(shared, "pwd", cwd="/no/such/place")


async def test_much_input_reaches_the_command_and_its_end_too(host: Host, shared: UUID) -> None:
    sent = bytes(range(256)) * 16_384
    answer = await host.ok(shared, "sha256sum", stdin=sent)
    assert answer.text.split()[0] == hashlib.sha256(sent).hexdigest()
    # A command that ends without reading all of it is no error.
    assert (await host.ok(shared, "head -c 3", stdin=b"abc" + sent)).output == b"abc"


async def test_a_timeout_kills_the_whole_group_and_keeps_the_output(host: Host, shared: UUID) -> None:
    began = time.monotonic()
    answer = await host.run(
        shared, "echo before; trap '' TERM INT; sleep 1234 & sleep 1234; echo after", timeout_seconds=2
    )
    assert (answer.exit_code, answer.body["timed_out"], answer.text) == (124, True, "before\n")
    assert 2 <= time.monotonic() - began < 60
    assert (await host.run(shared, "pgrep -f 'sleep 1234$'")).text == ""


async def test_a_background_process_lives_on_keeps_the_guest_awake_and_is_journalled(
    host: Host, instance: UUID
) -> None:
    await host.ok(instance, "nohup sleep 100 &")
    answer = await host.ok(instance, "(sleep 1.2; echo later; sleep 0.3; echo last) & echo now")
    assert answer.text == "now\n"
    said, data = await host.output(instance, answer.execution_id)
    assert (data, said["ended"], said["exit_code"]) == (b"now\n", True, 0)

    async def complete() -> bool:
        return (await host.output(instance, answer.execution_id))[1] == b"now\nlater\nlast\n"

    await eventually(complete, seconds=10)
    row = await host.listed(instance)
    assert row is not None
    assert (row["frozen"], row["user_processes"] >= 1) == (False, True)
    assert (await host.run(instance, "pgrep -c sleep")).text == "1\n"
    await host.ok(instance, "pkill sleep")

    async def frozen() -> bool:
        return (await host.listed(instance) or {})["frozen"]

    await eventually(frozen, seconds=15)


async def test_fifty_commands_at_once_keep_to_themselves(host: Host, shared: UUID) -> None:
    answers = await asyncio.gather(*(host.run(shared, f"echo {n}; exit {n}") for n in range(50)))
    assert [(answer.text, answer.exit_code) for answer in answers] == [(f"{n}\n", n) for n in range(50)]


@pytest.mark.parametrize("mebibytes", [5, 100])
async def test_large_outputs_are_kept_with_a_marked_gap(host: Host, shared: UUID, mebibytes: int) -> None:
    """Every eight bytes of the output are their own offset, so each kept byte can be checked."""
    total = mebibytes * MIB
    program = f"import struct,sys\nfor at in range(0, {total}, 65536): sys.stdout.buffer.write(struct.pack('>8192Q', *range(at, at + 65536, 8)))"
    answer = await host.ok(shared, f'python3 -c "{program}"', timeout_seconds=120)
    assert answer.body["output_bytes"] == total
    assert answer.body["output_truncated"]
    assert answer.output == numbered(0, MIB)
    said, data = await host.output(shared, answer.execution_id, limit=MIB)
    assert (said["total_bytes"], said["offset"], said["next_offset"], data) == (total, 0, MIB, numbered(0, MIB))
    if total <= HEAD + TAIL:
        assert said["gap"] is None
        said, data = await host.output(shared, answer.execution_id, offset=4_000_003, limit=10)
        assert (said["offset"], data) == (4_000_003, numbered(4_000_000, 16)[3:13])
        return
    assert said["gap"] == {"from": HEAD, "to": total - TAIL}
    # The last of the head, never a byte of the gap.
    said, data = await host.output(shared, answer.execution_id, offset=HEAD - 16, limit=1000)
    assert (said["next_offset"], data) == (HEAD, numbered(HEAD - 16, 16))
    for inside in (HEAD, HEAD + 7, total - TAIL - 1):
        said, data = await host.output(shared, answer.execution_id, offset=inside, limit=24)
        assert (said["offset"], data) == (total - TAIL, numbered(total - TAIL, 24))
    offset = total - TAIL
    while offset < total:
        said, data = await host.output(shared, answer.execution_id, offset=offset, limit=5 * MIB)
        assert data == numbered(offset, len(data)), offset
        offset = said["next_offset"]
    assert (offset, (await host.output(shared, answer.execution_id, offset=total + 5))[1]) == (total, b"")


def numbered(offset: int, size: int) -> bytes:
    assert offset % 8 == 0
    assert size % 8 == 0
    return b"".join(at.to_bytes(8, "big") for at in range(offset, offset + size, 8))


async def test_a_stream_brings_output_as_it_comes(host: Host, shared: UUID) -> None:
    request = verbs.Execute(shared, uuid4(), "echo one; sleep 0.7; echo two", 20, stream=True)
    came: list[tuple[bytes, float]] = []
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        async for event in call.events():
            assert isinstance(event, Data)
            came.append((event.data, time.monotonic()))
        assert (await call.result())["exit_code"] == 0
    assert [data for data, _ in came] == [b"one\n", b"two\n"]
    assert came[1][1] - came[0][1] > 0.5


async def test_a_client_that_goes_away_changes_nothing(host: Host, shared: UUID) -> None:
    request = verbs.Execute(shared, uuid4(), "echo one; sleep 1; echo two; exit 5", 20, stream=True)
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        async for event in call.events():
            assert event == Data(b"one\n")
            break

    async def ended() -> bool:
        return (await host.output(shared, request.execution_id))[0]["ended"]

    await eventually(ended, seconds=10)
    said, data = await host.output(shared, request.execution_id)
    assert (said["exit_code"], data) == (5, b"one\ntwo\n")


async def test_a_client_that_goes_away_within_its_input_ends_the_input(host: Host, shared: UUID) -> None:
    request = verbs.Execute(shared, uuid4(), "cat; echo end", 20, stdin=True)
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        await call.send_data(b"half")
        await asyncio.sleep(0.3)

    async def complete() -> bool:
        return (await host.output(shared, request.execution_id))[1] == b"halfend\n"

    await eventually(complete, seconds=10)


async def test_sudo(host: Host, shared: UUID) -> None:
    assert (await host.ok(shared, "sudo -n id -u")).text == "0\n"
    assert (await host.ok(shared, "sudo -u nobody id -un")).text == "nobody\n"
    assert (await host.run(shared, "sudo sh -c 'exit 3'")).exit_code == 3
    assert (await host.run(shared, "sudo sh -c 'kill -9 $$'")).exit_code == 137
    assert (await host.ok(shared, "echo typed | sudo tee /dev/stderr 2>&1 >/dev/null")).text == "typed\n"
    assert (await host.ok(shared, "sudo apt-get --version")).text.startswith("apt ")
    assert (await host.ok(shared, "sudo sh -c 'echo $SUDO_USER $HOME'")).text == "user /root\n"
    assert (await host.run(shared, "sudo -u no-such-user id")).exit_code == 1
    # Only the profile's user may: another one in the guest is refused.
    assert (await host.run(shared, "sudo -u nobody sudo -n id -u")).exit_code != 0


async def test_requests_that_make_no_sense_are_refused_by_name(host: Host, shared: UUID) -> None:
    with pytest.raises(InstanceNotFoundError):
        await host.run(uuid4(), "true")
    with pytest.raises(ExecutionNotFoundError):
        await host.output(shared, uuid4())
    params = to_wire(verbs.Execute(shared, uuid4(), "true", 5))
    for wrong in ({"surprise": 1}, {"timeout_seconds": "soon"}, {"command": None}, {"instance_id": "../../etc"}):
        with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
            await host.bus.request(host.daemon.host_id, "exec", {**params, **wrong}, timeout_seconds=5)


async def test_an_execution_id_is_used_once(host: Host, shared: UUID) -> None:
    answer = await host.ok(shared, "echo first")
    with pytest.raises(ConflictError):
        await host.run(shared, "echo second", execution_id=answer.execution_id)
    assert (await host.output(shared, answer.execution_id))[1] == b"first\n"
