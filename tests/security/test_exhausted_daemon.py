"""A daemon that has run out of something says so, makes nothing by halves, and works again once there is more."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from uuid import UUID

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually

from innkeeper.errors import UnavailableError
from innkeeper.host.exhaustion import unavailable

pytestmark = pytest.mark.anyio


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Every open(2) of this process, which the daemon is, fails with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.dup(0)
    os.close(next_one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@NEEDS_RUNSC
async def test_without_descriptors(host: Host, instance: UUID) -> None:
    await host.ok(instance, "true")
    before = set(host.settings.host_dir.joinpath("machines").iterdir())
    with no_descriptors():
        with pytest.raises(UnavailableError, match="descriptors"):
            await host.ensure()
        with pytest.raises(UnavailableError, match="descriptors"):
            await host.run(instance, "touch /home/user/never")
    new = await host.ensure()
    assert (await host.run(new, "echo new")).text == "new\n"
    await host.destroy(new)
    assert (await host.run(instance, "echo again")).text == "again\n"

    async def nothing_left() -> bool:
        return (await host.status())["leaked"] == 0 and set(
            host.settings.host_dir.joinpath("machines").iterdir()
        ) == before

    await eventually(nothing_left)


@pytest.mark.parametrize(
    ("number", "word"),
    [(errno.ENOSPC, "disk"), (errno.EDQUOT, "disk"), (errno.ENFILE, "descriptors"), (errno.EAGAIN, "processes"), (errno.ENOMEM, "memory")],
)  # fmt: skip
async def test_each_is_told_by_its_name(number: int, word: str) -> None:
    told = unavailable(OSError(number, "x"))
    assert told is not None and word in told.message


async def test_anything_else_is_not_hidden() -> None:
    assert unavailable(OSError(errno.EIO, "x")) is None
    assert unavailable(TimeoutError()) is None
