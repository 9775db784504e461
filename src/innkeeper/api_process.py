"""The API process as the launcher holds it.

It runs as an unprivileged user without any capability, in a mount namespace of its own in which code and state are bound below /mnt: so neither has to
lie where that user could reach it (a checkout in /root works).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import socket
import sys
from pathlib import Path
from typing import Any

import structlog

from innkeeper.bus.socketpair import make_socketpair
from innkeeper.errors import InnkeeperError
from innkeeper.host.linux import command
from innkeeper.settings import Settings
from innkeeper.settings_sources import ENV_PREFIX, text_of

log = structlog.stdlib.get_logger(__name__)

FIRST_TOKEN = "first-token"  # noqa: S105 - a file's name
SERVER_UUID = "server-uuid"
READY_SECONDS = 60.0
# A large database may be rebuilt table by table, and ending that in the middle would only begin it again.
MIGRATION_SECONDS = 3_600.0
# What it may take to stop beyond INNKEEPER_STOP_SECONDS.
STOP_GRACE_SECONDS = 5.0
SSH_BACKLOG = 128
INSIDE = Path("/mnt")
# $1 venv, $2 source, $3 state of the API, $4 user, then the command. A tmpfs over /mnt exists in this namespace only. The copies of guests' mounts that
# the namespace begins with, of this server and its neighbours (all have a `host` folder), are dropped: they would keep disks busy for as long as
# the API runs.
ENTER = """
set -e
awk '($1 == "overlay" || $1 ~ "^/dev/loop") && $2 ~ "/host/(mounts/|pool$)" {print $2}' /proc/self/mounts | sort -r | while read -r target; do
    umount -l "$(printf %b "$target")" || true
done
mount -t tmpfs -o size=64k,mode=755 none /mnt
mkdir /mnt/venv /mnt/src /mnt/api
mount --bind "$1" /mnt/venv
mount --bind "$2" /mnt/src
mount --bind "$3" /mnt/api
user=$4
shift 4
exec setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all --pdeathsig TERM -- "$@"
"""


class CannotStartError(InnkeeperError):
    """The server cannot start."""

    code = "cannot_start"


class ApiProcess:
    """A started API process. It waits for the daemon on `bus_end` before it opens a port."""

    def __init__(
        self, process: asyncio.subprocess.Process, bus_end: socket.socket, ready_fd: int, *, stop_seconds: float
    ) -> None:
        self.process = process
        self.bus_end = bus_end
        self._ready_fd = ready_fd
        self._stop_seconds = stop_seconds + STOP_GRACE_SECONDS
        self._said: asyncio.StreamReader | None = None
        self._pipe: asyncio.ReadTransport | None = None

    @classmethod
    async def spawn(cls, settings: Settings) -> ApiProcess:
        """Start it. Raises CannotStartError when its user does not exist."""
        account = _account(settings)
        settings.api_dir.mkdir(mode=0o700, exist_ok=True)
        os.chown(settings.api_dir, account.pw_uid, account.pw_gid)
        ssh = _ssh_listener(settings)
        api_end, host_end = make_socketpair()
        ready_read, ready_write = os.pipe()
        passed = (api_end.fileno(), ready_write, *(() if ssh is None else (ssh.fileno(),)))
        try:
            process = await command.spawn(
                _api_argv(settings, account.pw_name, api_end.fileno(), ready_write, ssh),
                env=_api_environment(settings),
                stdout=sys.stdout,
                stderr=sys.stderr,
                pass_fds=passed,
            )
        except BaseException:
            host_end.close()
            os.close(ready_read)
            raise
        finally:
            api_end.close()
            os.close(ready_write)
            if ssh is not None:
                ssh.close()
        return cls(process, host_end, ready_read, stop_seconds=settings.stop_seconds)

    async def wait_opened(self) -> None:
        """Wait until its database is open, of this version, and the one that this host's guests belong to. Raises CannotStartError."""
        await self._hear("opened")

    async def wait_ready(self, settings: Settings) -> None:
        """Wait until it listens; keeps the first token, which it sends once. Raises CannotStartError."""
        told = await self._hear("server_uuid")
        (settings.host_dir / SERVER_UUID).write_text(told["server_uuid"] + "\n")
        token = told["first_token"]
        if token is not None:
            path = settings.home / FIRST_TOKEN
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(token + "\n")

    async def _hear(self, wanted: str) -> dict[str, Any]:
        """The next thing that it says with the field `wanted`: it says one JSON object a line."""
        if self._said is None:
            self._said = asyncio.StreamReader()
            protocol = asyncio.StreamReaderProtocol(self._said)
            pipe = os.fdopen(os.dup(self._ready_fd), "rb")
            self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        patience = READY_SECONDS
        while True:
            try:
                async with asyncio.timeout(patience):
                    line = await self._said.readline()
            except TimeoutError:
                raise CannotStartError("the API process did not become ready") from None
            if not line:
                status = command.describe_status(await self.process.wait())
                raise CannotStartError(f"the API process ended at its start ({status})")
            told: dict[str, Any] = json.loads(line)
            if "refused" in told:
                raise CannotStartError(told["refused"])
            if "migrating" in told:
                log.info("the database is being migrated", from_revision=told["migrating"])
                patience = MIGRATION_SECONDS
            elif wanted in told:
                return told

    async def end(self) -> None:
        """End the process, gently first: it finishes its requests, for which it still needs the host. Idempotent."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._stop_seconds):
                    await self.process.wait()
        await command.end(self.process)

    async def stop(self) -> None:
        """`end`, and let go of the bus and the pipe; idempotent."""
        await self.end()
        self.bus_end.close()
        if self._pipe is not None:
            self._pipe.close()
        if self._ready_fd >= 0:
            os.close(self._ready_fd)
            self._ready_fd = -1


def _known_database(settings: Settings) -> str:
    """The database that this host's guests belong to; empty before the first start."""
    try:
        return (settings.host_dir / SERVER_UUID).read_text().strip()
    except FileNotFoundError:
        return ""


def _ssh_listener(settings: Settings) -> socket.socket | None:
    """The SSH gateway's socket, bound by root: clients of SSH expect port 22. None where there is no gateway. Raises CannotStartError."""
    if not settings.ssh_port:
        return None
    address = settings.ssh_listen or settings.listen
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, settings.ssh_port))
        listener.listen(SSH_BACKLOG)
    except OSError as error:
        listener.close()
        where = f"{address} port {settings.ssh_port}: {error.strerror}"
        raise CannotStartError(
            f"the SSH gateway cannot listen on {where}\nFIX: set INNKEEPER_SSH_PORT or INNKEEPER_SSH_LISTEN to another one"
        ) from None
    return listener


def _api_argv(settings: Settings, user: str, bus_fd: int, ready_fd: int, ssh: socket.socket | None = None) -> list[str]:
    source = Path(__file__).resolve().parent.parent
    inside = [
        f"{INSIDE}/venv/bin/python",
        "-m",
        "innkeeper.launch_api",
        str(bus_fd),
        str(ready_fd),
        _known_database(settings),
        *([] if ssh is None else [str(ssh.fileno())]),
    ]
    return [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        ENTER,
        "sh",
        sys.prefix,
        str(source),
        str(settings.api_dir),
        user,
        *inside,
    ]


def _api_environment(settings: Settings) -> dict[str, str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONPATH": f"{INSIDE}/src",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    # All that was said, wherever: the settings file is out of its reach, and options are nowhere else.
    for name in settings.model_fields_set:
        if (value := getattr(settings, name)) is not None:
            environment[ENV_PREFIX + name.upper()] = text_of(value)
    environment[ENV_PREFIX + "HOME"] = str(INSIDE)
    return environment


def _account(settings: Settings) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(settings.api_user)
    except KeyError:
        raise CannotStartError(
            f"there is no user {settings.api_user!r}\nFIX: useradd --system --no-create-home --shell /usr/sbin/nologin {settings.api_user}"
        ) from None
