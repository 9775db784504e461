"""A guest's root for the length of a test."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.rootfs import DiskPlan, InstanceDisk, mount_root, release


@asynccontextmanager
async def mounted_root(pool: DiskPool, plan: DiskPlan) -> AsyncIterator[InstanceDisk]:
    disk = await mount_root(pool, plan)
    try:
        yield disk
    finally:
        await release(plan.mount_directory)
