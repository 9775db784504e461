"""Warm pools: ready, unclaimed, frozen guests. Refilling runs beside the request path and yields to it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import structlog

from innkeeper.core.host_verbs import MachineShape, WarmPool
from innkeeper.errors import InnkeeperError, NoHostError
from innkeeper.host.machine import Machine
from innkeeper.host.metrics import HostMetrics

log = structlog.stdlib.get_logger(__name__)

RETRY_SECONDS = 5.0
# `none`: a pool that nobody wants any more, or whose daemon has not been told yet.
KINDS = ("room", "vm", "none")
# How long the request path must have been quiet before a guest is built for a pool; but a pool is never starved longer than the second figure.
QUIET_SECONDS = 0.05
STARVED_SECONDS = 2.0


class WarmPools:
    """Keeps each pool at its size.

    Args:
        build: makes one primed guest of a shape (the caller's admission included).
        discard: stops a guest and releases everything of it.
        busy: whether the request path has work right now.
        on_ready: called with a pool's key when a guest was added.

    """

    def __init__(
        self,
        *,
        build: Callable[[WarmPool], Awaitable[Machine]],
        discard: Callable[[Machine], Awaitable[None]],
        busy: Callable[[], bool],
        parallel: int,
        on_ready: Callable[[str], None],
        metrics: HostMetrics | None = None,
    ) -> None:
        self._metrics = metrics or HostMetrics()
        self._build = build
        self._discard = discard
        self._busy = busy
        self._parallel = parallel
        self._on_ready = on_ready
        self._desired: dict[str, WarmPool] = {}
        self._ready: dict[str, deque[Machine]] = {}
        self._building: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._known = False

    def set(self, pools: Iterable[WarmPool]) -> None:
        """Replace the desired pools; `run` does the rest."""
        self._desired = {pool.shape.pool_key: pool for pool in pools}
        self._not_before.clear()
        self._known = True
        self._wake.set()

    def adopt(self, machine: Machine) -> None:
        """Take in an unclaimed guest of an earlier daemon; it goes when its pool is not desired any more."""
        self._ready.setdefault(machine.record.shape.pool_key, deque()).append(machine)

    def claim(self, shape: MachineShape) -> Machine | None:
        """A ready guest of the shape, or None."""
        pool = self._ready.get(shape.pool_key)
        while pool:
            machine = pool.popleft()
            self._wake.set()
            if machine.failure is None:
                self._metrics.count_claim(self._kind(shape.pool_key), found=True)
                return machine
        if shape.pool_key in self._desired:
            self._metrics.count_claim(self._kind(shape.pool_key), found=False)
        return None

    def evict(self) -> Machine | None:
        """Give up the guest that will be missed least, to make room for an instance: one of the fullest pool."""
        fullest = max(self._ready.values(), key=len, default=None)
        return fullest.popleft() if fullest else None

    def forget(self, machine: Machine) -> None:
        """Drop a guest that failed."""
        pool = self._ready.get(machine.record.shape.pool_key)
        if pool is not None and machine in pool:
            pool.remove(machine)
            self._wake.set()

    def machines(self) -> list[Machine]:
        """Every ready guest."""
        return [machine for pool in self._ready.values() for machine in pool]

    def levels(self) -> list[dict[str, object]]:
        """`[{"pool_key", "size", "ready"}]`."""
        return [
            {"pool_key": key, "size": pool.size, "ready": len(self._ready.get(key, ()))}
            for key, pool in self._desired.items()
        ]

    def counts(self) -> dict[tuple[str, str], float]:
        """Guests of all pools by the pool's kind and by whether they are `wanted`, `ready` or `building`."""
        found = {(kind, state): 0.0 for kind in KINDS for state in ("wanted", "ready", "building")}
        for pool in self._desired.values():
            found[pool.kind, "wanted"] += pool.size
        for state, guests in (
            ("ready", {key: len(ready) for key, ready in self._ready.items()}),
            ("building", self._building),
        ):
            for key, count in guests.items():
                found[self._kind(key), state] += count
        return found

    def _kind(self, key: str) -> str:
        pool = self._desired.get(key)
        return "none" if pool is None else pool.kind

    async def run(self) -> None:
        """Fill and drain until cancelled."""
        async with asyncio.TaskGroup() as builds:
            while True:
                self._wake.clear()
                if self._known:
                    await self._drain()
                while (pool := self._next_deficit()) is not None:
                    await self._yield_to_requests()
                    key = pool.shape.pool_key
                    self._building[key] = self._building.get(key, 0) + 1
                    builds.create_task(self._fill_one(pool))
                waits = [moment - asyncio.get_running_loop().time() for moment in self._not_before.values()]
                try:
                    async with asyncio.timeout(max(0.01, min(waits)) if waits else None):
                        await self._wake.wait()
                except TimeoutError:
                    now = asyncio.get_running_loop().time()
                    self._not_before = {key: moment for key, moment in self._not_before.items() if moment > now}

    async def _drain(self) -> None:
        for key, pool in list(self._ready.items()):
            size = self._desired[key].size if key in self._desired else 0
            while len(pool) > size:
                machine = pool.popleft()
                try:
                    await self._discard(machine)
                except Exception:
                    log.exception("a warm guest could not be taken away", machine=machine.id)
            if not pool:
                del self._ready[key]

    def _next_deficit(self) -> WarmPool | None:
        if sum(self._building.values()) >= self._parallel:
            return None
        # The emptiest pool first, relative to its size.
        candidates = [
            (have / pool.size, pool)
            for key, pool in self._desired.items()
            if (have := len(self._ready.get(key, ())) + self._building.get(key, 0)) < pool.size
            and key not in self._not_before
        ]
        return min(candidates, key=lambda candidate: candidate[0])[1] if candidates else None

    async def _yield_to_requests(self) -> None:
        starved_at = asyncio.get_running_loop().time() + STARVED_SECONDS
        while self._busy() and asyncio.get_running_loop().time() < starved_at:
            await asyncio.sleep(QUIET_SECONDS)

    async def _fill_one(self, pool: WarmPool) -> None:
        key = pool.shape.pool_key
        try:
            machine = await self._build(pool)
        except Exception as error:
            # Whatever it is: raised here, it would end every pool until the daemon starts again.
            if not isinstance(error, NoHostError):
                known = isinstance(error, (InnkeeperError, OSError))
                log.warning("a warm guest could not be made", pool=key, error=str(error), exc_info=not known)
                self._metrics.count_failed_warm_build()
            self._not_before[key] = asyncio.get_running_loop().time() + RETRY_SECONDS
        else:
            self._ready.setdefault(key, deque()).append(machine)
            self._on_ready(key)
        finally:
            self._building[key] -= 1
            self._wake.set()
