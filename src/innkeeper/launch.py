"""`inn serve`: puts the host daemon, the bus and the API process together.

This process stays root and becomes the host daemon; `api_process` describes the other one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from innkeeper import shipped
from innkeeper.api_process import ApiProcess, CannotStartError
from innkeeper.bus.socketpair import serve_socketpair
from innkeeper.host.inventory import refuse_reasons, take_inventory
from innkeeper.log_setup import LogLevel, configure_logging, log_file
from innkeeper.restore import refuse_unfinished
from innkeeper.settings import Settings
from innkeeper.settings_values import comma_separated

if TYPE_CHECKING:
    from innkeeper.host.daemon import Daemon

log = structlog.stdlib.get_logger(__name__)

RESTART_SECONDS = 1.0


def serve(settings: Settings) -> None:
    """Run the server until SIGTERM or SIGINT. Exits with status 1, and the reason with its FIX line, where it cannot run."""
    level = configure_logging(
        form=settings.log_format,
        level=settings.log_level,
        process="host",
        file=log_file(settings, settings.host_dir / "log" / "host.log"),
    )
    # About ten descriptors a guest, more while it is watched: a shell's usual 1,024 would end at a hundred guests.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _run(_serve(settings, level))


def end_guests(settings: Settings) -> None:
    """End every guest of a server that does not run, and release the mounts, devices and namespaces of its host daemon. Disks
    stay: a room starts again on its own when it is next used. Exits with status 1, and the reason, where it cannot.
    """
    configure_logging(form=settings.log_format, level="warning", process="host")
    _run(_end_guests(settings))


def _run(main: Coroutine[None, None, None]) -> None:
    refusals: list[str] = []
    try:
        # Not uvloop: it takes SIGCHLD for itself, and the daemon reaps orphans.
        asyncio.run(main)
    except* CannotStartError as group:
        refusals = [str(error) for error in _leaves(group)]
    if refusals:
        print(f"inn: {refusals[0]}", file=sys.stderr)
        raise SystemExit(1)


def _leaves(group: BaseExceptionGroup[CannotStartError]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


async def _end_guests(settings: Settings) -> None:
    if os.geteuid() != 0:
        raise CannotStartError("inn end-guests needs root")
    if not settings.host_dir.is_dir():
        print(f"no server has run on {settings.home}")
        return
    with _only_server(settings):
        from innkeeper.host.daemon import run_daemon

        # The next daemon's own way of taking over, then its way of leaving nothing.
        async with run_daemon(
            settings,
            agent_binary=_agent_binary(settings),
            recipes=_recipes(settings),
            progress=lambda _: None,
            keep_running=False,
        ) as daemon:
            print(f"ending {len(daemon.fleet.machines())} guests", flush=True)


async def _serve(settings: Settings, level: LogLevel) -> None:
    began = time.monotonic()
    if os.geteuid() != 0:
        raise CannotStartError("inn serve needs root (the API process drops it)")
    if (unfinished := refuse_unfinished(settings)) is not None:
        raise CannotStartError(unfinished)
    settings.home.mkdir(mode=0o755, parents=True, exist_ok=True)
    settings.host_dir.mkdir(mode=0o700, exist_ok=True)
    reasons = refuse_reasons(await take_inventory(settings, quick=True))
    if reasons:
        raise CannotStartError("this host cannot run guests\n" + "\n".join(reasons))
    agent_binary, recipes = _agent_binary(settings), _recipes(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for number, name in ((signal.SIGUSR1, "debug"), (signal.SIGUSR2, settings.log_level)):
        loop.add_signal_handler(number, level.set, name)
    with _only_server(settings):
        api = await ApiProcess.spawn(settings)
        try:
            # Imported here: the API process takes a second to import its own half, and ours goes on beside it.
            from innkeeper.host.daemon import run_daemon

            stopped = loop.create_task(stop.wait())
            # Before the daemon looks at anything: a start that is refused for its database leaves guests and records as they are.
            if not await _opened(api, stopped):
                return
            async with run_daemon(
                settings,
                agent_binary=agent_binary,
                recipes=recipes,
                progress=lambda line: print(line, flush=True),
                keep_running=settings.keep_machines,
                level=level,
            ) as daemon:
                work = loop.create_task(_work(settings, daemon, api, began))
                await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
                stopped.cancel()
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
        finally:
            await api.stop()


async def _opened(api: ApiProcess, stopped: asyncio.Task[bool]) -> bool:
    """Whether the API process has its database open; False when the server is to stop before that. Raises CannotStartError."""
    opened = asyncio.get_running_loop().create_task(api.wait_opened())
    await asyncio.wait([opened, stopped], return_when=asyncio.FIRST_COMPLETED)
    if not opened.done():
        opened.cancel()
        await asyncio.wait([opened])
        return False
    opened.result()
    return True


async def _work(settings: Settings, daemon: Daemon, api: ApiProcess, began: float) -> None:
    """Serve until cancelled."""
    first = next(iter(comma_separated(settings.images)), "")
    if first in daemon.images.missing:
        # Nothing can run before there is an image; the others are built beside the server.
        await daemon.images.build(first)
    await _serve_api(settings, daemon, api, began)


async def _serve_api(settings: Settings, daemon: Daemon, api: ApiProcess, began: float) -> None:
    from innkeeper.startup_report import print_report, try_a_room

    building: asyncio.Task[None] | None = None
    try:
        while True:
            try:
                async with serve_socketpair(api.bus_end, daemon.host_id, daemon.handlers):
                    try:
                        await api.wait_ready(settings)
                        if building is None:
                            trial = await try_a_room(settings)
                            print_report(settings, daemon, trial, seconds=time.monotonic() - began)
                            building = asyncio.get_running_loop().create_task(daemon.images.build_missing())
                        await api.process.wait()
                    finally:
                        # Before the bus is closed: requests get their answers, and nobody takes an orderly stop for a lost host.
                        await api.end()
            finally:
                await api.stop()
            log.error("the API process ended; starting it again", status=api.process.returncode)
            await asyncio.sleep(RESTART_SECONDS)
            api = await ApiProcess.spawn(settings)
    finally:
        if building is not None:
            building.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await building


@contextlib.contextmanager
def _only_server(settings: Settings) -> Iterator[None]:
    """Two servers on one state directory would fight over its guests."""
    with (settings.host_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStartError(f"another server runs on {settings.home}") from None
        yield


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
