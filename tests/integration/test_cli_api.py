"""The command line against the real API process; no host is there, so what needs one is refused in the API's own words."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest

from innkeeper.bus.socketpair import make_socketpair, serve_socketpair

Inn = Callable[..., subprocess.CompletedProcess[str]]


async def _refuse_everything(end: socket.socket) -> None:
    """The host daemon's end of the bus with no verb on it, until the API goes away."""
    async with serve_socketpair(end, uuid4(), {}) as link:
        await link.wait_closed()


@pytest.fixture(scope="module")
def inn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inn]:
    home = tmp_path_factory.mktemp("home")
    (home / "api").mkdir()
    theirs, ours = make_socketpair()
    answering = threading.Thread(target=asyncio.run, args=(_refuse_everything(ours),), daemon=True)
    answering.start()
    ready_read, ready_write = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        "PATH": "/usr/bin:/bin",
        "INNKEEPER_HOME": str(home),
        "INNKEEPER_PORT": str(port),
        "INNKEEPER_ROOM_WAIT_SECONDS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "innkeeper.launch_api", str(theirs.fileno()), str(ready_write), ""],
        env=env,
        pass_fds=(theirs.fileno(), ready_write),
        stdout=subprocess.DEVNULL,
    )
    theirs.close()
    os.close(ready_write)
    try:
        with os.fdopen(ready_read) as ready:
            assert json.loads(ready.readline()) == {"opened": True}
            assert json.loads(ready.readline())["first_token"]

        def run(*argv: str, token: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
            environment = {"PATH": "/usr/bin:/bin", "INNKEEPER_HOME": str(home), **variables}
            if token is not None:
                environment |= {"INNKEEPER_URL": f"http://127.0.0.1:{port}", "INNKEEPER_TOKEN": token}
            code = "from innkeeper.cli.main import main; main()"
            return subprocess.run(
                [sys.executable, "-c", code, *argv],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )

        yield run
    finally:
        process.terminate()
        process.wait(20)
        answering.join(10)


def test_profiles_live_their_life(inn: Inn) -> None:
    created = inn(
        "profile", "create", "mine", "--image", "base", "--env", "SECRET=hidden", "--egress", "none", "--json"
    )
    assert created.returncode == 0, created.stderr
    assert json.loads(created.stdout)["env"] == ["SECRET"]
    assert "hidden" not in inn("profile", "show", "mine").stdout
    assert inn("profile", "create", "mine", "--image", "base").returncode == 1
    assert inn("profile", "update", "mine", "--memory-mb", "512", "--idle-seconds", "never").returncode == 0
    shown = json.loads(inn("profile", "show", "mine", "--json").stdout)
    assert (shown["memory_mb"], shown["idle_seconds"], shown["egress_policy"]) == (512, None, {"mode": "none"})
    refused = inn("profile", "update", "mine", "--memory-mb", "1")
    assert refused.returncode == 1 and "memory_mb: must be between" in refused.stderr
    assert inn("profile", "delete", "mine").returncode == 0
    assert "mine" not in inn("profile", "list").stdout


def test_tokens_work_until_they_are_revoked(inn: Inn) -> None:
    made = inn("token", "create", "ci", "--scope", "profiles")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert token.startswith("rk_live_")
    assert inn("profile", "list", token=token).returncode == 0
    forbidden = inn("token", "list", token=token)
    assert forbidden.returncode == 1 and "scope" in forbidden.stderr
    assert "ci" in inn("token", "list").stdout and token not in inn("token", "list").stdout
    assert inn("token", "revoke", "ci").returncode == 0
    unauthorized = inn("profile", "list", token=token)
    assert unauthorized.returncode == 1 and "INNKEEPER_TOKEN" in unauthorized.stderr


def test_the_audit_names_what_was_done(inn: Inn) -> None:
    inn("token", "create", "for-the-audit")
    ended = inn("audit", "--limit", "5", "--json")
    assert ended.returncode == 0, ended.stderr
    events = json.loads(ended.stdout)
    assert events[0]["object_type"] == "token" and len(events) <= 5


def test_lists_without_a_host(inn: Inn) -> None:
    for noun in ("room", "image", "host"):
        ended = inn(noun, "list")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines()[0].isupper()


def test_a_room_without_a_host_is_refused_in_the_apis_words(inn: Inn) -> None:
    for argv in (("room", "create", "base", ".."), ("run", "base", "r", "--", "true")):
        ended = inn(*argv)
        assert ended.returncode == 1 and ended.stdout == "", ended
        assert ended.stderr.startswith("inn: ") and "Traceback" not in ended.stderr
