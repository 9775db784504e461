"""Importing from registries: Debian's docker-registry, and some that mean harm; in namespaces of the test's own."""

# a test has nobody to keep waiting

from __future__ import annotations

import json
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from tests import leaks
from tests.integration import oci_fixture as oci
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host
from tests.integration.oci_fixture import file, import_reference, layer
from tests.integration.registry_world import PRIVATE, PUBLIC, Beyond, Registry, beyond, serving

from innkeeper.errors import InvalidRequestError
from innkeeper.host.disks.image_store import ImageStore

pytestmark = [
    pytest.mark.anyio,
    NEEDS_RUNSC,
    pytest.mark.skipif(
        oci.NEEDS_TOOLS or shutil.which("docker-registry") is None, reason="needs skopeo, umoci and docker-registry"
    ),
    pytest.mark.timeout(600),
]

# Of "robot" and PASSWORD.
HTPASSWD = "robot:$2b$04$w0.dZBlj3dZ2cAQeVGvuxexjhbwbbhDRz6Hwxa/SIjuX1DHn33hOq"
PASSWORD = "hunter2-pull"
OPEN, CLOSED, UNNAMED = 5_000, 5_001, 5_002
HOSTILE = 5_003
SECONDS = 20


@dataclass
class World:
    """A host, and registries beyond it that hold one image."""

    host: Host
    net: Beyond
    open: str
    closed: str
    private: str
    digest: str


@pytest.fixture(scope="module")
async def world(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("registries")
    layout = oci.Layout()
    image = layout.image([layer([("hello", file(b"from a registry"))])], {"User": "5:6"})
    layout.index(layout.several(image)).write(folder / "layout")
    async with beyond(folder) as net:
        # The operator allows the first two, which speak no TLS, and a port that nobody serves; not the third, on the private address.
        allowed = f"{PUBLIC}:{OPEN},{PUBLIC}:{CLOSED},{PUBLIC}:{HOSTILE}"
        settings = {"image_registries": allowed, "host_netns": net.host, "import_max_mb": 64, "import_timeout_seconds": SECONDS}  # fmt: skip
        async with running_host(home, **settings) as host:
            made = World(
                host=host,
                net=net,
                open=net.registry(OPEN),
                closed=net.registry(CLOSED, htpasswd=HTPASSWD),
                private=net.registry(UNNAMED, address=PRIVATE),
                digest=str(json.loads(layout.files["index.json"])["manifests"][0]["digest"]),
            )
            net.push(folder / "layout", f"{made.open}/team/app:1")
            net.push(folder / "layout", f"{made.private}/team/app:1")
            net.push(folder / "layout", f"{made.closed}/team/app:1", f"--dest-creds=robot:{PASSWORD}")
            yield made
    assert leaks.wait_for_none(home) == []


@pytest.fixture(autouse=True)
async def nothing_left(world: World) -> AsyncIterator[None]:
    yield
    disks = world.host.settings.host_dir / "pool" / "disks"
    assert await eventually(lambda: not list(disks.glob("*.img")))
    assert (await world.host.status())["leaked"] == 0


def content(world: World, digest: str) -> str:
    return (ImageStore(world.host.settings.host_dir).mount(digest) / "hello").read_text()


async def test_by_tag_by_digest_and_known_again(world: World) -> None:
    first = await import_reference(world.host, f"{world.open}/team/app:1")
    assert content(world, first.digest) == "from a registry"
    assert first.made["config"]["user"] == "5:6"
    again = await import_reference(world.host, f"{world.open}/team/app@{world.digest}")
    assert (again.digest, again.made["known"]) == (first.digest, True)
    assert again.steps == ["asking the registry", "already here"]
    print(f"import from a registry {first.seconds:.1f} s, known {again.seconds:.1f} s")


async def test_what_is_not_there(world: World) -> None:
    for reference, reason in (
        (f"{world.open}/team/app:nosuch", "manifest unknown"),
        (f"{world.open}/team/app@sha256:{'0' * 64}", "manifest unknown"),
        (f"{world.open}/nosuch/app:1", "unknown"),
        (f"{PUBLIC}:{HOSTILE}/x/y:1", "does not answer"),
    ):
        with pytest.raises(InvalidRequestError, match=reason):
            await import_reference(world.host, reference)


async def test_credentials(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    reference = f"{world.closed}/team/app:1"
    with pytest.raises(InvalidRequestError, match="authentication required"):
        await import_reference(world.host, reference)
    with pytest.raises(InvalidRequestError, match=r"unauthorized|authentication required"):
        await import_reference(world.host, reference, "robot", "hunter2-wrong")
    made = await import_reference(world.host, reference, "robot", PASSWORD)
    assert content(world, made.digest) == "from a registry"
    # Command lines are logged; nothing else of it reaches the log or the import's own lines either.
    captured = capfd.readouterr()
    assert "skopeo" in captured.out + captured.err
    assert "hunter2" not in captured.out + captured.err + str(made)


async def test_private_addresses_are_refused(world: World) -> None:
    log = world.net.folder / f"registry-{UNNAMED}.log"
    before = log.read_text()
    assert "GET" in before
    for reference in (
        f"{world.private}/team/app:1",
        f"127.0.0.1:{world.host.settings.port}/x/y:1",
        f"localhost:{OPEN}/x/y:1",
        "169.254.169.254/x/y:1",
        f"[::1]:{OPEN}/x/y:1",
        f"[::ffff:{PRIVATE}]:{UNNAMED}/team/app:1",
        f"8.8.8.2:{OPEN}/x/y:1",
    ):
        with pytest.raises(InvalidRequestError, match=r"no public address|skopeo|not an image in a registry"):
            await import_reference(world.host, reference)
    assert log.read_text() == before


async def test_only_named_hosts_are_asked_without_tls(world: World) -> None:
    """The same machine at a port that the operator did not name: public, so it is dialled, but it has to speak TLS."""
    asked: list[str] = []

    class Plain(Registry):
        def answer(self) -> None:
            asked.append(self.path)
            self.say(200, b"{}")

    with world.net.web(5_010, Plain), pytest.raises(InvalidRequestError):
        await import_reference(world.host, f"{PUBLIC}:5010/x/y:1")
    assert asked == []


def an_image() -> dict[str, bytes]:
    layout = oci.Layout()
    return layout.index(layout.image([layer([("f", file(str(time.monotonic()).encode()))])])).files


async def test_redirects_lead_nowhere_private(world: World) -> None:
    def away(self: Registry, _: bytes) -> None:
        self.say(307, b"", Location=f"http://{PRIVATE}:{UNNAMED}/stolen")

    with (
        world.net.web(HOSTILE, serving(an_image(), answer=away)) as registry,
        pytest.raises(InvalidRequestError, match=f"{PRIVATE}:{UNNAMED}"),
    ):
        await import_reference(world.host, f"{registry}/x/y:1")
    assert "stolen" not in (world.net.folder / f"registry-{UNNAMED}.log").read_text()


async def test_blobs_that_are_not_what_they_should_be(world: World) -> None:
    def other(self: Registry, blob: bytes) -> None:
        self.say(200, bytes(len(blob)), "application/octet-stream")

    with world.net.web(HOSTILE, serving(an_image(), answer=other)) as registry, pytest.raises(InvalidRequestError, match=r"skopeo"):  # fmt: skip
        await import_reference(world.host, f"{registry}/x/y:1")


async def test_another_manifest_than_the_digest_names(world: World) -> None:
    with world.net.web(HOSTILE, serving(an_image(), answer=None)) as registry, pytest.raises(InvalidRequestError):
        await import_reference(world.host, f"{registry}/x/y@sha256:{'1' * 64}")


async def test_an_endless_registry_is_cut(world: World) -> None:
    def endless(self: Registry, _: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 20))
        except OSError:
            self.close_connection = True

    with world.net.web(HOSTILE, serving(an_image(), answer=endless)) as registry, pytest.raises(InvalidRequestError):
        await import_reference(world.host, f"{registry}/x/y:1")


async def test_a_slow_registry_is_given_up(world: World) -> None:
    ended = False

    def slow(self: Registry, _: bytes) -> None:
        nonlocal ended
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            for _ in range(600):
                self.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            ended = True

    with world.net.web(HOSTILE, serving(an_image(), answer=slow)) as registry:
        with pytest.raises(InvalidRequestError, match=f"not done within {SECONDS} seconds"):
            await import_reference(world.host, f"{registry}/x/y:1")
        assert await eventually(lambda: ended)


async def test_a_manifest_without_end(world: World) -> None:
    class Endless(Registry):
        def answer(self) -> None:
            if self.path == "/v2/":
                self.say(200, b"{}")
                return
            self.say(200, b'{"x":"' + b"x" * (16 << 20) + b'"}', "application/vnd.oci.image.manifest.v1+json")

    with world.net.web(HOSTILE, Endless) as registry, pytest.raises(InvalidRequestError):
        await import_reference(world.host, f"{registry}/x/y:1")
