"""A hostile program in place of skopeo, in the very jail that an import makes: whatever it tries, it stays inside, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from tests import leaks
from tests.integration import oci_fixture as oci
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host
from tests.integration.registry_world import HOST_ADDRESS, PRIVATE, PUBLIC, Beyond, Registry, beyond

from innkeeper.bus.contract import Message
from innkeeper.core.host_verbs import ImportImage, to_wire
from innkeeper.errors import InvalidRequestError
from innkeeper.host.linux import netns
from innkeeper.host.linux.jail import FIRST_UID, NOBODY, JailPlan

pytestmark = [
    pytest.mark.anyio,
    NEEDS_RUNSC,
    pytest.mark.skipif(oci.NEEDS_TOOLS, reason="needs skopeo and umoci"),
    pytest.mark.timeout(600),
]

PROGRAM = Path(__file__).parent / "guest_programs" / "jail_breaker.py"
PORT = 7_777
# In the command line of everything that is run here: what has it and is alive is left over.
MARK = f"jail-breaker-{uuid4()}"
ARCHIVE, REFERENCE = ImportImage("oci-archive"), ImportImage("registry", f"{PUBLIC}:{PORT}/x/y:1", "robot", "hunter2")
KINDS = pytest.mark.parametrize("request_of", [ARCHIVE, REFERENCE], ids=["archive", "registry"])


@pytest.fixture(scope="module")
async def net(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Beyond]:
    async with beyond(tmp_path_factory.mktemp("beyond")) as made:
        yield made


@pytest.fixture(scope="module")
async def host(net: Beyond, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    home = tmp_path_factory.mktemp("home")
    async with running_host(home, host_netns=net.host, import_max_mb=64, import_timeout_seconds=120) as running:
        yield running
    assert leaks.wait_for_none(home) == []


@pytest.fixture(scope="module")
def canary() -> Iterator[Path]:
    """A file of the host that everybody may read and write: the jail alone keeps it."""
    path = Path(f"/var/tmp/innkeeper-jail-canary-{os.getpid()}")
    path.write_text("secret of the host")
    path.chmod(0o666)
    yield path
    assert path.read_text() == "secret of the host"
    path.unlink()


@pytest.fixture(scope="module")
def victim() -> Iterator[int]:
    """A process of the host with the very uid that fetching has."""
    process = subprocess.Popen(["setpriv", f"--reuid={FIRST_UID + NOBODY}", "--clear-groups", "sleep", "1000"])
    yield process.pid
    assert process.poll() is None
    process.kill()
    process.wait()


def instead_of_skopeo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Everything else of the plan stays: user, binds, environment, proxy, control group."""
    real = JailPlan.command
    argv = ("/usr/bin/python3", "-I", "-S", "/jail_breaker.py", *arguments, MARK)

    def command(self: JailPlan) -> list[str]:
        assert self.argv[0] == "/usr/bin/skopeo"
        return real(dataclasses.replace(self, argv=argv, binds=(*self.binds, (str(PROGRAM), "/jail_breaker.py", "ro"))))

    monkeypatch.setattr(JailPlan, "command", command)


async def lines_of(host: Host, request: ImportImage, *, until: str) -> list[str]:
    """What the program says up to a line; then the import is abandoned, if it has not ended."""
    lines: list[str] = []
    with contextlib.suppress(InvalidRequestError):
        async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
            if request.reference is None:
                await call.send_data(b"archive")
                await call.send_message({"sent": True})
            async for event in call.events():
                if isinstance(event, Message) and "line" in event.body:
                    lines.append(event.body["line"])
                    if event.body["line"] == until:
                        break
    return lines


def alive() -> dict[int, bytes]:
    """The processes that carry the mark, and their command lines."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            if MARK.encode() in words and int(entry.name) != os.getpid():
                found[int(entry.name)] = words
    return found


def clean(host: Host) -> bool:
    below = host.settings.host_dir
    group = f"innkeeper-{leaks.server_id(host.settings.home)}-imports/"
    held = list((below / "pool" / "disks").glob("*.img")) + list((below / "images").glob(".import-*"))
    return not (alive() or held or any(one.startswith(group) for one in leaks._groups()))


@KINDS
async def test_no_way_leads_out(
    monkeypatch: pytest.MonkeyPatch, host: Host, net: Beyond, canary: Path, victim: int, request_of: ImportImage
) -> None:
    own = socket.create_server(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{own.getsockname()[1]}", f"{HOST_ADDRESS}:{PORT}", f"{PRIVATE}:{PORT}"]
    began, seen = time.monotonic(), []

    class Noting(Registry):
        def answer(self) -> None:
            seen.append(self.path)

    at_host = netns.call_inside(net.host, lambda: socket.create_server((HOST_ADDRESS, PORT)))
    with own, at_host, net.web(PORT, Noting, address=PRIVATE), net.web(PORT, Noting):
        instead_of_skopeo(monkeypatch, "probe", str(canary), str(victim), *addresses)
        said = await lines_of(host, request_of, until="done")
        for listener in (own, at_host):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert said[-1] == "done", said
    assert [line for line in said if not line.startswith("held ")] == ["done"]
    assert len(said) > 100 and seen == []
    held = dict(line.removeprefix("held ").split(": ", 1) for line in said[:-1])
    assert "killed by SIGKILL" in held["memory bomb"] and "EAGAIN" in held["fork bomb"]
    assert "killed by SIGSYS" in held["32-bit numbers"] or os.uname().machine != "x86_64"
    assert {held[name] for name in held if name.startswith("call ")} == {"EPERM"}
    assert "ENOSPC" in held["disk"] and "ENOSPC" in held["temporary files"]
    assert all("403" in held[name] for name in held if name.startswith("proxy to "))
    assert request_of is ARCHIVE or sum(name.startswith("proxy to ") for name in held) == 7
    print(
        f"{len(held)} ways out of the jail of {request_of.kind}, {time.monotonic() - began:.0f} s; {held['fork bomb']}; {held['disk']}"
    )
    assert await eventually(lambda: clean(host))
    assert (await host.status())["leaked"] == 0


@KINDS
async def test_nothing_outlives_its_import(
    monkeypatch: pytest.MonkeyPatch, host: Host, request_of: ImportImage
) -> None:
    instead_of_skopeo(monkeypatch, "linger")
    said = await lines_of(host, request_of, until="lingering")
    assert said[-1] == "lingering", said
    assert await eventually(lambda: clean(host))
    assert (await host.status())["leaked"] == 0


async def test_nothing_outlives_the_process_that_watches_a_jail(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """The outer process of the jail is killed, and the inner one asked the kernel not to be told."""
    instead_of_skopeo(monkeypatch, "linger")
    killed = []
    async with host.bus.open(host.daemon.host_id, ARCHIVE.verb, to_wire(ARCHIVE)) as call:
        await call.send_data(b"archive")
        await call.send_message({"sent": True})
        # Not only when the time of the import is over.
        with pytest.raises(InvalidRequestError, match="skopeo"):
            async for event in call.events():
                if isinstance(event, Message) and event.body.get("line") == "lingering":
                    (outer,) = (pid for pid, words in alive().items() if b"linux.jail" in words)
                    os.kill(outer, signal.SIGKILL)
                    killed.append(outer)
            await call.result()
    assert killed
    assert await eventually(lambda: clean(host))
    assert (await host.status())["leaked"] == 0
