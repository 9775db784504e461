"""What `inn serve` says when it is ready, with a real command run in a real room through the real API."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from innkeeper.core.image import ImageStatus
from innkeeper.core.isolation import Offer
from innkeeper.host.daemon import Daemon
from innkeeper.settings import Settings
from innkeeper.settings_values import comma_separated

TRIAL_SECONDS = 60.0
TRIAL_COMMAND = 'echo "Hello from $(uname -sm), as $(id -un)" | tee hello.txt'
SOCKET_NAME = "inn.sock"


@dataclass(frozen=True, slots=True)
class Trial:
    """A command that was run in a new room: its answer and what it took, or why it could not be run."""

    profile: str
    answer: dict[str, Any] | None
    create_ms: float
    command_ms: float
    failure: str | None = None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TRIAL_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


async def try_a_room(settings: Settings) -> Trial:
    """Make a room, run a command, remove the room. Never raises: a report says what went wrong."""
    return await asyncio.to_thread(_try_a_room, settings)


def _try_a_room(settings: Settings) -> Trial:
    connection = _UnixConnection(settings.api_dir / SOCKET_NAME)
    wanted = next(iter(comma_separated(settings.images)), "base")
    try:
        profiles = _call(connection, "GET", "/api/profiles")
        profile = next((one for one in profiles if one["name"] == wanted), None)
        if profile is None:
            return Trial(wanted, None, 0, 0, f"there is no profile {wanted!r}")
        room = f"/api/profile/{profile['id']}/room/{quote('start-' + uuid4().hex[:8])}"
        began = time.monotonic()
        _call(connection, "POST", room)
        created = time.monotonic()
        answer = _call(connection, "POST", f"{room}/command", {"command": TRIAL_COMMAND})
        ended = time.monotonic()
        _call(connection, "DELETE", room)
        return Trial(wanted, answer, (created - began) * 1000, (ended - created) * 1000)
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        return Trial(wanted, None, 0, 0, str(error) or type(error).__name__)
    finally:
        connection.close()


def _call(connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read()
    if response.status >= 400:
        raise ValueError(
            f"{method} {path.rsplit('/', 1)[0]}/…: {response.status} {json.loads(text).get('message', '')}"
        )
    return json.loads(text) if text else None


def _driver(offer: Offer) -> str:
    if offer.isolation is None:
        return f"{offer.driver} cannot run: {offer.reason}"
    return f"{offer.driver} on {offer.isolation.platform}: {offer.reason}"


def print_report(settings: Settings, daemon: Daemon, trial: Trial | None, *, seconds: float) -> None:
    """Print the report."""
    print(report(settings, daemon, trial, seconds=seconds), flush=True)


def report(settings: Settings, daemon: Daemon, trial: Trial | None, *, seconds: float) -> str:
    """The report as text."""
    listen = f"[{settings.listen}]" if ":" in settings.listen else settings.listen
    url = f"http://{listen}:{settings.port}"
    token = settings.home / "first-token"
    images = ", ".join(
        image.name if image.status is ImageStatus.READY else f"{image.name} ({image.status})"
        for image in daemon.images.list()
    )
    pools = ", ".join(f"{level['ready']}/{level['size']}" for level in daemon.fleet.warm.levels()) or "none yet"
    lines = [
        "",
        f"Innkeeper is ready on {url} after {seconds:.1f} s",
        *(f"  driver    {_driver(offer)}" for offer in daemon.drivers.offers()),
        f"  images    {images}",
        f"  pools     {pools} guests ready",
        f"  adopted   {daemon.recovered.adopted} guests of an earlier run; {daemon.recovered.removed} leftovers removed",
        f"  token     {token}",
        "",
        "Try it:",
        f'  curl -s -H "Authorization: Bearer $(cat {token})" {url}/api/profiles',
        "",
    ]
    if trial is None:
        return "\n".join(lines)
    if trial.answer is None:
        return "\n".join([*lines, f"A first room could not be used: {trial.failure}"])
    result = trial.answer["result"]
    lines += [
        f"A first room, on profile {trial.profile}: ready after {trial.create_ms:.0f} ms",
        f"  $ {TRIAL_COMMAND}",
        *(f"  {line}" for line in result["output"].splitlines()),
        f"  exit code {result['exit_code']} after {trial.command_ms:.0f} ms; files changed:",
        *(f"    {change['status']:9}{change['path']}  {change['size']} bytes" for change in result["files_changed"]),
        "",
        "Stop with Ctrl-C; guests run on, and the next start adopts them."
        if settings.keep_machines
        else "Stop with Ctrl-C.",
    ]
    return "\n".join(lines)
