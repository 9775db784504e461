"""One server's guest network: ready-made slots, policies, and what is left after a crash."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import structlog

from innkeeper.errors import InnkeeperError
from innkeeper.host.linux import nftables
from innkeeper.host.linux.command import CommandFailed
from innkeeper.host.network import firewall, router, slots, tap
from innkeeper.host.network.addressing import ServerPlan, Slot, is_public
from innkeeper.host.network.firewall import FirewallLimits, Limited, Policy, PolicyClass
from innkeeper.host.network.resolver import Decide, Resolver, everything
from innkeeper.host.network.upstream import HostUpstreams, NameServers, Upstream

log = structlog.stdlib.get_logger(__name__)

# One `ip` process makes this many; more would keep the first of them waiting.
BATCH = 8
RETRY_SECONDS = 1.0


class SlotsExhaustedError(InnkeeperError):
    """This host has no network slot left."""

    code = "service_unavailable"


class SlotGoneError(InnkeeperError):
    """The machine's network slot no longer exists."""

    code = "slot_gone"


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """What an operator may set.

    `subnet`: the guests' subnet, /28 or larger (None: a free /20 is chosen and kept). `pool_size`: slots ready ahead.
    `upstreams`: the name servers to ask (None: the host's own). `host_netns`: name or path of a namespace that plays the host's
    part (None: the one we are in).
    """

    limits: FirewallLimits = field(default_factory=FirewallLimits)
    subnet: IPv4Network | None = None
    pool_size: int = 4
    upstreams: tuple[Upstream, ...] | None = None
    host_netns: str | None = None


class Network:
    """Hands out slots. Get one by `async with Network.open(...) as network:`."""

    def __init__(
        self, plan: ServerPlan, settings: NetworkSettings, found: router.Found, resolver: Resolver, mtu: int
    ) -> None:
        self.plan = plan
        self.mtu = mtu
        self.found = found
        self.resolver = resolver
        self.keep_running = True
        self._settings = settings
        self._in_use: dict[int, Policy] = {}
        # Of slots that are in use or wait to be taken apart.
        self._limited: dict[int, Limited] = {}
        self._unclaimed: dict[int, Policy] = {
            slot.index: PolicyClass.INTERNET if slot.index in found.online else PolicyClass.NONE for slot in found.slots
        }
        self._ready: deque[Slot] = deque()
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._discarded: list[Slot] = list(found.broken)
        blocked = {*self._unclaimed, *(slot.index for slot in found.broken)}
        # The index that was given back longest ago comes first, so that a new guest does not meet packets of an old
        # guest's connections.
        self._free = deque(index for index in range(plan.capacity) if index not in blocked)
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._work.set()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        server_id: str,
        run_directory: Path,
        *,
        settings: NetworkSettings | None = None,
        decide: Decide = everything,
        keep_running: bool = True,
    ) -> AsyncIterator["Network"]:
        """Set up the server's network, or adopt what an earlier run left, and keep it working until the block ends.

        Slots of an earlier run keep their policy and stay reserved until `adopt` or `sweep`. Afterwards the router and
        the slots in use stay, or everything goes: `keep_running`, also settable later on the network itself. Raises
        CommandFailed, NoFreeSubnetError, and OSError when another process of this server serves DNS already.
        """
        settings = settings or NetworkSettings()
        host_netns, limits = settings.host_netns, settings.limits
        async with router.one_at_a_time():
            plan = await router.open_plan(server_id, run_directory, subnet=settings.subnet, host_netns=host_netns)
            found = await router.bring_up(plan, limits, host_netns=host_netns)
        upstreams = settings.upstreams
        ask = HostUpstreams() if upstreams is None else lambda: upstreams
        resolver = Resolver(
            plan.resolver_ip,
            inside=plan.router_netns,
            name_servers=NameServers(ask, host_netns=host_netns),
            may_be_told=_may_be_told(limits.allowed_cidrs),
            decide=decide,
        )
        network = cls(plan, settings, found, resolver, await router.uplink_mtu(host_netns))
        network.keep_running = keep_running
        async with resolver.serving():
            maintenance = asyncio.create_task(network._maintain(), name="network slots")
            try:
                yield network
            finally:
                maintenance.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await maintenance
                await network._wind_down()

    @property
    def in_use(self) -> Mapping[int, Policy]:
        """The slots that were handed out or adopted, and the policy of each."""
        return dict(self._in_use)

    @property
    def ready(self) -> int:
        """How many slots `acquire` can hand out at once."""
        return len(self._ready)

    async def refused_packets(self) -> dict[str, int]:
        """Packets of guests that were `refused` by the policy, or dropped: their sender was `spoofed`, or they were a `dns_flood`."""
        return await nftables.counters("ip", firewall.TABLE, inside=self.plan.router_netns)

    async def acquire(self, policy: Policy = PolicyClass.INTERNET) -> Slot:
        """A fresh slot: at once from the pool with the internet policy, one nft process later with another.

        Raises SlotsExhaustedError when the subnet is full, CommandFailed when a slot cannot be made.
        """
        slot = self._ready.popleft() if self._ready and not self._waiting else await self._next_ready()
        self._in_use[slot.index] = PolicyClass.INTERNET
        self._work.set()
        if policy is not PolicyClass.INTERNET:
            try:
                await self.set_policy(slot, policy)
            except BaseException:
                await self.release(slot)
                raise
        return slot

    async def set_policy(self, slot: Slot, policy: Policy) -> None:
        """Change what a slot in use may reach, open connections included. Raises SlotGoneError, CommandFailed."""
        if slot.index not in self._in_use:
            raise SlotGoneError
        before = self._in_use[slot.index]
        if before != policy:
            text = firewall.set_policy(slot, policy, before=before)
            await nftables.apply(text, inside=self.plan.router_netns)
            self._in_use[slot.index] = policy
            self._limited.pop(slot.index, None)
            if isinstance(policy, Limited):
                self._limited[slot.index] = policy

    async def open_tap(self, slot: Slot) -> int:
        """See `tap.open_tap`. Raises SlotGoneError for a slot that is not in use."""
        if slot.index not in self._in_use:
            raise SlotGoneError
        return await tap.open_tap(self.plan, slot, mtu=self.mtu)

    async def release(self, slot: Slot) -> None:
        """Give a slot back after its guest is gone; it is taken apart in the background. Harmless when repeated."""
        if self._in_use.pop(slot.index, None) is not None:
            self._discard([slot])

    async def adopt(self, index: int, policy: Policy | None = None) -> Slot:
        """Take over the slot of a machine that outlived the daemon, with its old policy or another.

        Raises SlotGoneError when it does not exist any more: that machine has no network.
        """
        try:
            self._in_use[index] = self._unclaimed.pop(index)
        except KeyError:
            raise SlotGoneError from None
        slot = self.plan.slot(index)
        if policy is not None:
            await self.set_policy(slot, policy)
        return slot

    async def sweep(self, keep: Collection[int] = ()) -> int:
        """Remove every slot of an earlier run that was neither adopted nor is in `keep`; return how many went."""
        doomed = [self.plan.slot(index) for index in self._unclaimed if index not in keep]
        for slot in doomed:
            del self._unclaimed[slot.index]
        self._discard(doomed)
        await self.settle()
        return len(doomed)

    def accounted(self, held: Collection[int]) -> set[int]:
        """Slots that may exist: those in use by whoever is in `held`, those ready, being made, and waiting to be taken apart."""
        return set(range(self.plan.capacity)) - set(self._free) - (self._in_use.keys() - set(held))

    async def settle(self) -> None:
        """Return when the pool is full and nothing waits to be taken apart."""
        self._idle.clear()
        self._work.set()
        await self._idle.wait()

    def _discard(self, discarded: Sequence[Slot]) -> None:
        self._discarded.extend(discarded)
        self._work.set()

    async def _next_ready(self) -> Slot:
        if not self._free and not self._discarded and not self._ready:
            raise SlotsExhaustedError
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._work.set()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._discard([future.result()])  # handed over in the moment we were cancelled
            raise

    async def _maintain(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            try:
                # A guest that waits comes before tidying up.
                while await self._refill() or await self._tidy():
                    pass
            except (CommandFailed, OSError) as error:
                log.warning("network slots cannot be made or taken apart; trying again", reason=str(error))
                while self._waiting:
                    if not (waiting := self._waiting.popleft()).done():
                        waiting.set_exception(error)
                await asyncio.sleep(RETRY_SECONDS)
                self._work.set()
            else:
                if not self._work.is_set():
                    self._idle.set()

    async def _refill(self) -> bool:
        """Make one batch of slots, if any are wanted; whether there was something to do."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        self._hand_out()
        wanted = min(self._settings.pool_size + len(self._waiting) - len(self._ready), BATCH, len(self._free))
        if wanted <= 0:
            if self._waiting and not self._discarded:
                self._waiting.popleft().set_exception(SlotsExhaustedError())
                return True
            return False
        batch = [self.plan.slot(self._free.popleft()) for _ in range(wanted)]
        try:
            await slots.create(self.plan, batch, mtu=self.mtu)
        except BaseException:
            self._free.extend(slot.index for slot in batch)
            raise
        self._ready.extend(batch)
        self._hand_out()
        return True

    def _hand_out(self) -> None:
        while self._waiting and self._ready:
            if not (waiting := self._waiting.popleft()).done():
                waiting.set_result(self._ready.popleft())

    async def _tidy(self) -> bool:
        """Take a batch of slots apart, if any were given back; whether there was something to do."""
        batch = self._discarded[:BATCH]
        if not batch:
            return False
        await slots.destroy(self.plan, batch, limited=self._limited)
        del self._discarded[: len(batch)]
        for slot in batch:
            self._limited.pop(slot.index, None)
        self._free.extend(slot.index for slot in batch)
        return True

    async def _wind_down(self) -> None:
        while self._waiting:
            self._waiting.popleft().cancel()
        if self.keep_running:
            await slots.destroy(self.plan, [*self._discarded, *self._ready], limited=self._limited)
        else:
            await router.remove(self.plan, host_netns=self._settings.host_netns)


def _may_be_told(allowed: Sequence[IPv4Network]) -> Callable[[IPv4Address], bool]:
    return lambda address: is_public(address) or any(address in network for network in allowed)
