"""Docker's own daemon in a microVM: it starts, imports an image, and runs a container with a network of its own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from tests.integration.booted_vm import NEEDS_QEMU
from tests.integration.daemon_fixture import Host, running_host
from tests.integration.image_fixture import RECIPES, cache_directory
from tests.integration.test_daemon_templates import home

from innkeeper.core.host_verbs import EnsureMachine
from innkeeper.host.disks.image_build import build_image
from innkeeper.host.disks.image_store import ImageRecord, ImageStore

pytestmark = [pytest.mark.anyio, NEEDS_QEMU, pytest.mark.long, pytest.mark.timeout(3_600)]
__all__ = ["home"]
# Alone, where each instruction is translated, the daemon answers after half a minute and the container after another.
SECONDS = 900
# The package, not the registry, which no test may name.
DOCKER = ".".join(("docker", "io"))
RECIPE = f'from = "base"\npackages = ["busybox-static", "docker-cli", "{DOCKER}", "iptables"]\n'
START = (
    "(dockerd > /tmp/dockerd.log 2>&1 &); until docker version --format '{{.Server.Os}}' 2> /dev/null; do sleep 1; done"
)
IMPORT = (
    "mkdir -p /tmp/root/bin; cp /bin/busybox /tmp/root/bin/sh; tar -C /tmp/root -c . | docker import - tiny > /dev/null"
)
RUN = "docker run --rm tiny /bin/sh -c 'hostname; id -u; ip -4 -o addr show dev eth0; wget -q -O - http://172.17.0.1:8000/told'"


async def docker_image(folder: Path) -> ImageRecord:
    """The base image with Docker, built once per machine and recipe."""
    shutil.copytree(RECIPES / "base", folder / "base")
    (folder / "docker-test").mkdir()
    (folder / "docker-test" / "recipe.toml").write_text(RECIPE)
    store = ImageStore(cache_directory())
    return await build_image(folder / "docker-test", store, progress=lambda line: print(line, file=sys.stderr))


@pytest.fixture
async def host(home: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    record = await docker_image(tmp_path_factory.mktemp("recipes"))
    store = ImageStore(home / "host")
    shutil.copyfile(record.path, store.directory / record.path.name)
    shutil.copyfile(record.path.parent / "docker-test.json", store.directory / "docker-test.json")
    async with running_host(home, pool_disk_mb=16_384) as host:
        host.image = record
        yield host


async def test_a_container(host: Host) -> None:
    shape = host.shape(driver="qemu", memory_mb=1_536, disk_mb=8_192, user="root")
    request = EnsureMachine(uuid4(), shape, "docker")
    host.instances.add(request.instance_id)
    await host.request(request, timeout_seconds=SECONDS)
    guest = request.instance_id
    assert (await host.ok(guest, START, timeout_seconds=SECONDS)).text.split() == ["linux"]
    await host.ok(guest, IMPORT, timeout_seconds=SECONDS)
    served = "mkdir -p /tmp/www; echo of the guest > /tmp/www/told; (busybox httpd -f -p 8000 -h /tmp/www > /dev/null 2>&1 &)"
    await host.ok(guest, served, timeout_seconds=SECONDS)
    name, uid, address, *told = (await host.ok(guest, RUN, timeout_seconds=SECONDS)).text.splitlines()
    # A name, a network and an address of the container's own; through Docker's bridge it reaches the guest.
    assert (len(name), uid, told) == (12, "0", ["of the guest"]) and " 172.17.0." in address
