"""Fixtures that security tests share: the daemon in this process for one kind, a whole server behind an internet of the tests' own for the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tests.integration.daemon_fixture import anyio_backend, host, instance

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("acceptance", "integration", "security")]
from internet_fixture import Internet, internet  # noqa: E402
from server_fixture import Api, Room, Server, server  # noqa: E402
from tests.guest_drivers import Servers  # noqa: E402

__all__ = ["anyio_backend", "host", "instance"]


@pytest.fixture(scope="package")
def world() -> Iterator[Internet]:
    """Namespaces that stand for the host and for everything beyond it."""
    with internet() as made:
        yield made


@pytest.fixture(scope="package")
def servers(world: Internet) -> Iterator[Servers]:
    """`inn serve` with the image `base`, whose guests live behind the world's host; one for each driver."""

    def start(driver: str) -> AbstractContextManager[Server]:
        settings = {"INNKEEPER_HOST_NETNS": world.host, "INNKEEPER_DNS_UPSTREAMS": world.address}
        return server("base", driver=driver, **settings)

    with Servers.started_by(start) as made:
        yield made


@pytest.fixture(scope="package")
def innkeeper(servers: Servers, driver: str) -> Server:
    """The server whose guests run with the test's driver."""
    return servers[driver]


@pytest.fixture(scope="package")
def api(innkeeper: Server) -> Api:
    """The API with the first token."""
    return innkeeper.api()


@pytest.fixture(scope="package")
def base(api: Api) -> str:
    """The id of the profile `base`."""
    return api.profile("base")


@pytest.fixture(scope="module")
def attacker(api: Api, base: str) -> Iterator[Room]:
    """A ready room with whatever it is that attacks."""
    made = api.room(base)
    made.create()
    yield made
    made.delete()


@pytest.fixture(scope="module")
def neighbour(api: Api, base: str) -> Iterator[Room]:
    """A ready room that must not notice."""
    made = api.room(base)
    made.create()
    yield made
    made.delete()
