"""`inn serve`: puts the host daemon, the bus and the API process together.

This process stays root and becomes the host daemon. The API runs as an unprivileged child without any capability, in a mount namespace of its own in
which code and state are bound below /mnt: so neither has to lie where that user could reach it (a checkout in /root works).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pwd
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from innkeeper import shipped
from innkeeper.bus.socketpair import make_socketpair, serve_socketpair
from innkeeper.errors import InnkeeperError
from innkeeper.host.daemon import Daemon, run_daemon
from innkeeper.host.inventory import refuse_reasons, take_inventory
from innkeeper.host.linux import command
from innkeeper.log_setup import configure_logging
from innkeeper.settings import ENV_PREFIX, Settings
from innkeeper.startup_report import print_report, try_a_room

log = structlog.stdlib.get_logger(__name__)

FIRST_TOKEN = "first-token"  # noqa: S105 - a file's name
READY_SECONDS = 60.0
STOP_SECONDS = 15.0
RESTART_SECONDS = 1.0
INSIDE = Path("/mnt")
# $1 venv, $2 source, $3 state of the API, $4 user, then the command. A tmpfs over /mnt exists in this namespace only. The copies of guests' mounts that
# the namespace begins with are dropped: they would keep disks busy for as long as the API runs.
ENTER = """
set -e
awk '$1 == "overlay" || $1 ~ "^/dev/loop" {print $2}' /proc/self/mounts | sort -r | while read -r target; do
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


def serve(settings: Settings) -> None:
    """Run the server until SIGTERM or SIGINT. Exits with status 1, and the reason with its FIX line, where it cannot run."""
    configure_logging(form=settings.log_format, level=settings.log_level, process="host")
    try:
        # Not uvloop: it takes SIGCHLD for itself, and the daemon reaps orphans.
        asyncio.run(_serve(settings))
    except CannotStartError as error:
        print(f"inn: {error.message}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


async def _serve(settings: Settings) -> None:
    began = time.monotonic()
    if os.geteuid() != 0:
        raise CannotStartError("inn serve needs root (the API process drops it)")
    settings.home.mkdir(mode=0o755, parents=True, exist_ok=True)
    settings.host_dir.mkdir(mode=0o700, exist_ok=True)
    reasons = refuse_reasons(await take_inventory(settings, quick=True))
    if reasons:
        raise CannotStartError("this host cannot run guests\n" + "\n".join(reasons))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with _only_server(settings):
        async with run_daemon(
            settings,
            agent_binary=_agent_binary(settings),
            recipes=_recipes(settings),
            progress=lambda line: print(line, flush=True),
            keep_running=settings.keep_machines,
        ) as daemon:
            work = loop.create_task(_work(settings, daemon, began))
            stopped = loop.create_task(stop.wait())
            await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work


async def _work(settings: Settings, daemon: Daemon, began: float) -> None:
    """Serve until cancelled."""
    first = next(iter(settings.images.split(",")), "")
    if first in daemon.images.missing:
        # Nothing can run before there is an image; the others are built beside the server.
        await daemon.images.build(first)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(daemon.images.build_missing())
        reported = False
        while True:
            async with _api(settings, daemon) as api:
                if not reported:
                    reported = True
                    trial = await try_a_room(settings)
                    print_report(settings, daemon, trial, seconds=time.monotonic() - began)
                await api.wait()
            log.error("the API process ended; starting it again", status=api.returncode)
            await asyncio.sleep(RESTART_SECONDS)


@asynccontextmanager
async def _api(settings: Settings, daemon: Daemon) -> AsyncIterator[asyncio.subprocess.Process]:
    """The API process, ready to answer."""
    account = _account(settings)
    settings.api_dir.mkdir(mode=0o700, exist_ok=True)
    os.chown(settings.api_dir, account.pw_uid, account.pw_gid)
    api_end, host_end = make_socketpair()
    ready_read, ready_write = os.pipe()
    try:
        async with serve_socketpair(host_end, daemon.host_id, daemon.handlers):
            process = await command.spawn(
                _api_argv(settings, account.pw_name, api_end.fileno(), ready_write),
                env=_api_environment(settings),
                stdout=sys.stdout,
                stderr=sys.stderr,
                pass_fds=(api_end.fileno(), ready_write),
            )
            api_end.close()
            os.close(ready_write)
            try:
                await _wait_ready(settings, ready_read, process)
                yield process
            finally:
                await _stop(process)
    finally:
        os.close(ready_read)


def _api_argv(settings: Settings, user: str, bus_fd: int, ready_fd: int) -> list[str]:
    source = Path(__file__).resolve().parent.parent
    inside = [f"{INSIDE}/venv/bin/python", "-m", "innkeeper.launch_api", str(bus_fd), str(ready_fd)]
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
    for name in type(settings).model_fields:
        value = os.environ.get(ENV_PREFIX + name.upper())
        if value is not None:
            environment[ENV_PREFIX + name.upper()] = value
    for name in ("listen", "port", "insecure"):
        environment[ENV_PREFIX + name.upper()] = str(getattr(settings, name))
    environment[ENV_PREFIX + "HOME"] = str(INSIDE)
    return environment


async def _wait_ready(settings: Settings, ready_fd: int, process: asyncio.subprocess.Process) -> None:
    """Wait until the API listens; keeps the first token, which it sends once."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(ready_fd), "rb")
    )
    try:
        async with asyncio.timeout(READY_SECONDS):
            text = await reader.read()
    except TimeoutError:
        raise CannotStartError("the API process did not become ready") from None
    finally:
        transport.close()
    if not text:
        raise CannotStartError(f"the API process ended at its start ({command.describe_status(await process.wait())})")
    token = json.loads(text)["first_token"]
    if token is not None:
        path = settings.home / FIRST_TOKEN
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(token + "\n")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
    await command.end(process)


@contextlib.contextmanager
def _only_server(settings: Settings) -> Iterator[None]:
    """Two servers on one state directory would fight over its guests."""
    with (settings.host_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStartError(f"another server runs on {settings.home}") from None
        yield


def _account(settings: Settings) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(settings.api_user)
    except KeyError:
        raise CannotStartError(
            f"there is no user {settings.api_user!r}\nFIX: useradd --system --no-create-home --shell /usr/sbin/nologin {settings.api_user}"
        ) from None


def _agent_binary(settings: Settings) -> Path:
    path = shipped.agent_binary(settings)
    if path is None:
        raise CannotStartError("the guest agent is not built\nFIX: make agent")
    return path


def _recipes(settings: Settings) -> Path:
    path = shipped.recipes(settings)
    if path is None:
        raise CannotStartError(
            "the image recipes are missing\nFIX: set INNKEEPER_IMAGES_DIR to the folder with the recipes"
        )
    return path
