"""One server for the whole folder, in an internet of the tests' own; rooms that tests share where they leave nothing behind."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integration")]
from instavm_client import Instavm  # noqa: E402
from internet_fixture import Internet, internet  # noqa: E402
from server_fixture import Api, Room, Server, free_port, server, until  # noqa: E402
from tests.guest_drivers import QEMU, Servers  # noqa: E402

LOG_TAIL = 20_000
# A profile whose rooms nobody touches: the shortest idle time is a minute, which passes while the other tests run.
SHORT_LIVED = "short-lived"
FIRST_GUEST_SECONDS = 250
# Of the registry beyond the host, which a module that wants one starts.
REGISTRY_PORT = 5_000


@pytest.fixture(scope="package")
def world() -> Iterator[Internet]:
    """Namespaces that stand for the host and for everything beyond it."""
    with internet() as made:
        yield made


@pytest.fixture(scope="package")
def servers(world: Internet) -> Iterator[Servers]:
    """`inn serve` with all shipped images, whose guests live behind the world's host; one for each driver."""

    @contextlib.contextmanager
    def start(driver: str) -> Iterator[Server]:
        settings = {"INNKEEPER_HOST_NETNS": world.host, "INNKEEPER_DNS_UPSTREAMS": world.address}
        settings["INNKEEPER_SSH_PORT"] = str(free_port())
        settings["INNKEEPER_IMAGE_REGISTRIES"] = f"{world.address}:{REGISTRY_PORT}"
        with server("base", "python-data-science", "node", driver=driver, **settings) as running:
            api = running.api()
            if driver == QEMU:
                # Where instructions are translated, guests that wait for nobody take the processors from those of the tests.
                for name, size in (("base", 1), ("python-data-science", 0), ("node", 0)):
                    answer = api.client.patch(f"/api/profile/{api.profile(name)}", json={"warm_pool_size": size})
                    assert answer.status_code == 200, answer.text
            profile = api.make_profile(idle_seconds=60, name=SHORT_LIVED)
            idle = api.room(profile, "idle")
            # The first microVM of a shape waits for its template, which on a busy machine takes longer than a request does.
            until(lambda: idle.client.post(idle.path).status_code == 200, seconds=FIRST_GUEST_SECONDS)
            idle.output("echo content > file.txt")
            api.room(profile, "at-work").output("nohup sleep 10000 > /dev/null 2>&1 &")
            yield running

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
def instavm(innkeeper: Server, tmp_path_factory: pytest.TempPathFactory) -> Instavm:
    """The `instavm` package with the first token of the server."""
    return Instavm(innkeeper.url, innkeeper.token, tmp_path_factory.mktemp("instavm"))


@pytest.fixture(scope="package")
def base(api: Api) -> str:
    """The id of the profile `base`."""
    return api.profile("base")


@pytest.fixture
def room(api: Api, base: str) -> Iterator[Room]:
    """A room of the test's own, on `base`."""
    made = api.room(base)
    yield made
    made.delete()


@pytest.fixture(scope="module")
def shared(api: Api, base: str) -> Iterator[Room]:
    """A ready room for tests that only look."""
    made = api.room(base)
    made.create()
    yield made
    made.delete()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """A failure shows what its servers said."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Server):
                report.sections.append((f"log of the server on {value.home}", value.log()[-LOG_TAIL:]))
    return report
