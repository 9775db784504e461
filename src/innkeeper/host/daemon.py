"""The host daemon: root's half of a server. Everything it does is asked for by validated messages on the bus."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pwd
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import structlog

from innkeeper import __version__, shipped
from innkeeper.bus.contract import Handler
from innkeeper.core.leak import Leak
from innkeeper.errors import InnkeeperError
from innkeeper.host import disk_use, recovery, retention, standstills
from innkeeper.host.admission import Admission, committed_mb, total_memory_mb
from innkeeper.host.agent_recipes import load_agents
from innkeeper.host.backup import Backups
from innkeeper.host.build_steps import BuildSteps
from innkeeper.host.change_scanner import ChangeScanner
from innkeeper.host.checkpoints import Checkpoints
from innkeeper.host.directories import Directories
from innkeeper.host.disks.checkpoint_store import CheckpointStore
from innkeeper.host.disks.disk_pool import DiskPool, open_pool
from innkeeper.host.disks.image_store import ImageStore
from innkeeper.host.disks.oci_import import ImageImporter
from innkeeper.host.disks.oci_job import ImportLimits, RegistryRoutes
from innkeeper.host.disks.step_cache import StepCache
from innkeeper.host.disks.template_store import TemplateStore
from innkeeper.host.disks.volume_store import VolumeStore
from innkeeper.host.drivers.registry import DriverRegistry, open_drivers
from innkeeper.host.execution_verbs import ExecutionVerbs
from innkeeper.host.executions import Executions
from innkeeper.host.file_changes import FileChanges
from innkeeper.host.fleet import Fleet
from innkeeper.host.garbage import GarbageCollector
from innkeeper.host.image_verbs import ImageVerbs
from innkeeper.host.instance_logs import InstanceLogs
from innkeeper.host.kernels.kernel_store import KernelStore
from innkeeper.host.leaks import InUse, find_leaks
from innkeeper.host.linux.cgroup import CgroupTree
from innkeeper.host.linux.subreaper import OrphanReaper, become_subreaper
from innkeeper.host.log_verbs import LogVerbs
from innkeeper.host.machine import Machine
from innkeeper.host.machine_builder import MachineBuilder
from innkeeper.host.metrics import HostMetrics
from innkeeper.host.network.firewall import FirewallLimits
from innkeeper.host.network.network import Network, NetworkSettings
from innkeeper.host.network.upstream import parse_upstream
from innkeeper.host.operator_verbs import OperatorVerbs
from innkeeper.host.ports import Ports
from innkeeper.host.programs import Programs
from innkeeper.host.readings import HostReadings
from innkeeper.host.shipped_images import ShippedImages
from innkeeper.host.suspensions import Suspensions
from innkeeper.host.terminals import Terminals
from innkeeper.host.trees import Trees
from innkeeper.host.turns import Turns
from innkeeper.host.usage import UsageLedger
from innkeeper.host.verbs import Verbs, Watchers
from innkeeper.host.volumes import Volumes
from innkeeper.log_setup import LogLevel
from innkeeper.settings import Settings
from innkeeper.settings_values import comma_separated
from innkeeper.vitals import Vitals

log = structlog.stdlib.get_logger(__name__)

MIB = 1_048_576
# Of those that are named; all are counted.
MAX_LEAKS = 1_000
# Debian's `nobody`: the scanner owns nothing but its instances' folders, which no other process of that user can reach.
SCANNER_USER = "nobody"


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon: its host id, its verbs, and what the start found."""

    host_id: UUID
    handlers: Mapping[str, Handler]
    drivers: DriverRegistry
    images: ShippedImages
    fleet: Fleet
    recovered: recovery.Recovered


@asynccontextmanager
async def run_daemon(
    settings: Settings,
    *,
    agent_binary: Path,
    recipes: Path,
    progress: Callable[[str], None],
    keep_running: bool = True,
    level: LogLevel | None = None,
) -> AsyncIterator[Daemon]:
    """The daemon, ready to serve. At the end its machines run on for the next one to adopt, unless `keep_running` is false.

    `level` is what the operator may change the daemon's logging by.
    """
    become_subreaper()
    directories = Directories(settings.host_dir)
    directories.make()
    nobody = pwd.getpwnam(SCANNER_USER)
    watchers = Watchers()
    metrics, vitals = HostMetrics(), Vitals("host")
    pool = await open_pool(settings.host_dir, size_mib=settings.pool_disk_mb)
    store = ImageStore(settings.host_dir)
    agent_dir = install_agent(agent_binary, settings.host_dir)
    drivers = await open_drivers(settings, directories, agent=agent_dir / "inn-agent")
    images = ShippedImages(
        store=store,
        recipes=recipes,
        ready=shipped.ready_images(settings),
        names=comma_separated(settings.images),
        on_change=lambda name, status: watchers.publish({"type": "image.changed", "name": name, "status": status}),
        progress=progress,
        metrics=metrics,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(OrphanReaper().running())
        network = await stack.enter_async_context(
            Network.open(
                settings.server_id,
                settings.host_dir / "run",
                settings=network_settings(settings),
                keep_running=keep_running,
            )
        )
        scanner = await stack.enter_async_context(
            ChangeScanner.start(agent_dir / "inn-agent", uid=nobody.pw_uid, gid=nobody.pw_gid)
        )
        changes = FileChanges(
            scanner,
            directories.changes,
            records=directories.instances,
            scanner_uid=nobody.pw_uid,
            scanner_gid=nobody.pw_gid,
            metrics=metrics,
        )
        builder = MachineBuilder(
            directories=directories,
            drivers=drivers,
            network=network,
            disks=pool,
            images=store,
            agent_dir=agent_dir,
            freeze_after_seconds=settings.freeze_after_seconds,
        )
        admission = Admission(
            settings.memory_overcommit,
            settings.memory_reserve_mb,
            settings.disk_reserve_mb,
            pool.free_bytes,
            pool.free_files,
        )
        steps = StepCache(
            pool,
            limit_bytes=settings.build_cache_mb * MIB,
            has_image=lambda digest: (store.directory / f"{digest}.erofs").exists(),
        )
        await asyncio.to_thread(steps.sweep)
        checkpoint_store = CheckpointStore(pool.directory / "checkpoints")
        suspensions = Suspensions(disks=pool, drivers=drivers, agents=agent_dir.parent)
        logs = InstanceLogs(directories.logs, limit_bytes=settings.instance_log_mb * MIB)
        usage = UsageLedger(directories.usage)
        usage.sweep()
        fleet = Fleet(
            directories=directories,
            builder=builder,
            admission=admission,
            changes=changes,
            steps=steps,
            checkpoints=checkpoint_store,
            suspensions=suspensions,
            templates=TemplateStore(pool.directory / "machine-templates"),
            drivers=drivers,
            disks=pool,
            max_starts=settings.max_starts,
            on_failure=lambda instance_id, failure: watchers.publish(
                {"type": "machine.failed", "instance_id": str(instance_id), "failure": failure}
            ),
            on_pool_ready=lambda key: watchers.publish({"type": "pool.ready", "pool_key": key}),
            metrics=metrics,
            usage=usage,
            logs=logs,
        )
        stack.push_async_callback(_wind_down, fleet, drivers, store, pool, keep_running=keep_running)
        turns = Turns(settings.max_execs or 4 * (os.cpu_count() or 1))
        executions = Executions(changes=changes, turns=turns, metrics=metrics)
        terminals = Terminals(fleet, turns, limit=settings.max_terminals)
        programs = Programs(fleet, turns, limit=settings.max_terminals)

        volume_store = VolumeStore(pool.directory / "volumes")
        volumes = Volumes(fleet=fleet, store=volume_store)

        def resume(machine: Machine) -> None:
            executions.resume(machine, fleet.journals_of(machine))
            terminals.resume(machine)
            volumes.resume(machine)
            if machine.restored:
                programs.hang_up_on_orphans(machine)

        fleet.resume = resume
        recovered = await recovery.recover(
            directories=directories,
            drivers=drivers,
            network=network,
            disks=pool,
            builder=builder,
            fleet=fleet,
            suspensions=suspensions,
            usage=usage,
        )
        for adopted in fleet.machines():
            programs.hang_up_on_orphans(adopted)
        images_in_use = fleet.images_in_use()
        for digest in {} if images_in_use is None else await store.collect(images_in_use):
            log.info("removed an image that nothing stands on", digest=digest[:12])
        importer = ImageImporter(
            directories=directories,
            pool=pool,
            store=store,
            group=CgroupTree.detect().server_root(f"innkeeper-{settings.server_id}-imports"),
            limits=import_limits(settings),
            routes=RegistryRoutes(
                allow=settings.image_registries,
                authorities=settings.registry_ca_file,
                name_servers=tuple(comma_separated(settings.dns_upstreams)),
                host_netns=settings.host_netns or None,
            ),
        )
        await importer.sweep()
        filling = asyncio.get_running_loop().create_task(fleet.warm.run())
        stack.push_async_callback(_cancel, filling)
        forgetting = asyncio.get_running_loop().create_task(
            retention.run(
                fleet,
                executions,
                logs,
                days=settings.execution_retention_days,
                log_days=settings.log_retention_days,
            )
        )
        stack.push_async_callback(_cancel, forgetting)
        letting_go_on = asyncio.get_running_loop().create_task(standstills.run(fleet, pool.free_bytes))
        stack.push_async_callback(_cancel, letting_go_on)
        host_id = persistent_host_id(settings.host_dir)

        async def collect_images(keep: frozenset[str]) -> dict[str, Any]:
            store.release(keep)
            used = fleet.images_in_use()
            removed = {} if used is None else await store.collect(used)
            return {"removed": sorted(removed), "freed_bytes": sum(removed.values())}

        def in_use() -> InUse:
            held = fleet.held()
            return InUse(
                machines={machine.id for machine in held} | builder.under_way | importer.under_way,
                disks=_owned(fleet, pool),
                # A machine on its way up holds a slot that only its builder knows.
                slots=network.accounted(
                    network.in_use if builder.under_way else {machine.record.slot_index for machine in held}
                ),
            )

        async def find() -> list[Leak]:
            """What was in use before the look or after it is none: it may have come up or gone down meanwhile."""
            before = in_use()
            found = await find_leaks(before, directories=directories, drivers=drivers, plan=network.plan, disks=pool)
            if found:
                found = await find_leaks(
                    before | in_use(), directories=directories, drivers=drivers, plan=network.plan, disks=pool
                )
            if found:
                log.warning("leaked resources", leaks=[f"{leak.kind} {leak.name}" for leak in found])
            return found

        async def status() -> dict[str, Any]:
            machines = fleet.machines()
            leaks = await find()
            return {
                "host_id": str(host_id),
                "name": os.uname().nodename,
                "drivers": [offer.to_wire() for offer in drivers.offers()],
                "cpus": os.cpu_count(),
                "memory_mb": total_memory_mb(),
                "memory_committed_mb": committed_mb(fleet.loads()),
                "memory_limit_mb": admission.memory_limit_mb(),
                "disk_free_mb": pool.free_bytes() // MIB,
                "machines": len(machines),
                "frozen": sum(machine.frozen for machine in machines),
                "pools": fleet.warm.levels(),
                "execs_waiting": turns.waiting,
                "leaked": len(leaks),
                "leaks": [asdict(leak) for leak in leaks[:MAX_LEAKS]],
                "version": __version__,
            }

        verbs = Verbs(
            fleet=fleet,
            changes=changes,
            watchers=watchers,
            list_images=images.list,
            agents=[{"id": name, "table": table} for name, (_, table) in load_agents(recipes).items()],
            collect_images=collect_images,
            status=status,
            agent_version=agent_dir.name,
        )
        await stack.enter_async_context(vitals.watching())
        operator = OperatorVerbs(
            level=level or LogLevel(settings.log_level),
            metrics=metrics,
            readings=HostReadings(
                fleet, drivers, admission, turns, network, pool, volume_store, scanner, changes, vitals
            ),
            fleet=fleet,
            garbage=GarbageCollector(
                directories,
                pool,
                store,
                checkpoint_store,
                volume_store,
                suspensions,
                fleet,
                builder,
                agent_dir,
                KernelStore(settings.host_dir),
                drivers.booted,
                collect_images,
                execution_retention_days=settings.execution_retention_days,
            ),
            measure_disk=lambda: disk_use.measure(directories, pool),
            usage=usage,
            backups=Backups(directories=directories, fleet=fleet, disks=pool, images=store.directory, volumes=volumes),
        )
        builds = BuildSteps(
            fleet=fleet,
            disks=pool,
            images=store,
            cache=steps,
            uid=nobody.pw_uid,
            gid=nobody.pw_gid,
            max_image_bytes=settings.image_max_mb * MIB,
        )
        checkpoints = Checkpoints(
            directories=directories,
            fleet=fleet,
            drivers=drivers,
            disks=pool,
            store=checkpoint_store,
            suspensions=suspensions,
            agents=agent_dir.parent,
            disk_reserve_mb=settings.disk_reserve_mb,
        )
        handlers = {**verbs.handlers(), **operator.handlers(), **builds.handlers(), **ImageVerbs(importer).handlers()}
        handlers |= {
            **ExecutionVerbs(fleet, executions).handlers(),
            **LogVerbs(logs).handlers(),
            **checkpoints.handlers(),
            **volumes.handlers(),
            **Ports(fleet).handlers(),
            **Trees(fleet).handlers(),
            **terminals.handlers(),
            **programs.handlers(),
        }
        yield Daemon(host_id, handlers, drivers, images, fleet, recovered)


async def _wind_down(
    fleet: Fleet, drivers: DriverRegistry, store: ImageStore, pool: DiskPool, *, keep_running: bool
) -> None:
    await fleet.close(keep_running=keep_running)
    await drivers.close(keep_running=keep_running)
    if not keep_running:
        await store.unmount_all()
        await pool.close()


def _owned(fleet: Fleet, pool: DiskPool) -> set[str]:
    """Disks that are no leaks: all of them while a record cannot be read."""
    try:
        return fleet.owned_disks()
    except InnkeeperError:
        return set(pool.disks())


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def install_agent(binary: Path, host_dir: Path) -> Path:
    """A copy of the agent in a folder named by its content: running guests keep theirs when a newer one is installed."""
    content = binary.read_bytes()
    folder = host_dir / "agent" / hashlib.sha256(content).hexdigest()[:16]
    target = folder / "inn-agent"
    if not target.exists():
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary = folder / ".inn-agent.new"
        shutil.copyfile(binary, temporary)
        temporary.chmod(0o755)
        temporary.replace(target)
    return folder


def persistent_host_id(host_dir: Path) -> UUID:
    """This host's id, made at its first start."""
    path = host_dir / "host-id"
    try:
        return UUID(path.read_text().strip())
    except FileNotFoundError:
        temporary = path.with_suffix(".new")
        temporary.write_text(f"{uuid4()}\n")
        temporary.replace(path)
        return UUID(path.read_text().strip())


def import_limits(settings: Settings) -> ImportLimits:
    """The limits of imports out of the server's settings."""
    return ImportLimits(
        max_mib=settings.import_max_mb,
        max_files=settings.import_max_files,
        seconds=settings.import_timeout_seconds,
        reserve_mib=settings.disk_reserve_mb,
    )


def network_settings(settings: Settings) -> NetworkSettings:
    """The network's settings out of the server's."""
    allowed = tuple(IPv4Network(text) for text in comma_separated(settings.allowed_cidrs))
    upstreams = tuple(parse_upstream(text) for text in comma_separated(settings.dns_upstreams)) or None
    return NetworkSettings(
        limits=FirewallLimits(allowed_cidrs=allowed), upstreams=upstreams, host_netns=settings.host_netns or None
    )
