"""Importing from registries as they are on the internet: by name, behind TLS, with tokens and blobs of other hosts. All of it is the test's own."""

# a test has nobody to keep waiting

from __future__ import annotations

import base64
import itertools
import json
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from tests import leaks
from tests.acceptance.internet_fixture import certificates
from tests.integration import oci_fixture as oci
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host
from tests.integration.oci_fixture import file, import_reference, layer
from tests.integration.registry_world import OTHER_PUBLIC, PRIVATE, PUBLIC, Beyond, Registry, beyond, serving

from innkeeper.errors import InvalidRequestError, UnavailableError
from innkeeper.host.disks.image_store import ImageStore

pytestmark = [
    pytest.mark.anyio,
    NEEDS_RUNSC,
    pytest.mark.skipif(
        oci.NEEDS_TOOLS or shutil.which("docker-registry") is None, reason="needs skopeo, umoci and docker-registry"
    ),
    pytest.mark.timeout(600),
]

NAMES = (
    "registry.test",
    "turning.test",
    "both.test",
    "closed.test",
    "hostile.test",
    "auth.test",
    "blobs.test",
    "private.test",
)
TLS, CLOSED, HOSTILE, PRIVATE_TLS, AUTH = 443, 5_443, 6_443, 444, 443
PASSWORD = "hunter2-token"


@dataclass
class World:
    """A host that asks the test's name server and trusts its authority; registries and a token server beyond it."""

    host: Host
    net: Beyond
    authorities: Path
    server: Path
    tls: ssl.SSLContext
    asked: list[str]
    token_requests: list[str]

    def private_requests(self) -> int:
        return (self.net.folder / f"registry-{PRIVATE_TLS}.log").read_text().count("GET")

    def content(self, digest: str) -> str:
        return (ImageStore(self.host.settings.host_dir).mount(digest) / "hello").read_text()


@pytest.fixture(scope="module")
async def world(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("registries")
    tls, authority = certificates(folder, NAMES)
    server, authorities = folder / "server.pem", folder / "authorities.pem"
    authorities.write_bytes(authority)
    (folder / "roots.pem").write_bytes(authority)
    layout = oci.Layout()
    layout.index(layout.image([layer([("hello", file(b"by name"))])])).write(folder / "layout")
    turns = itertools.cycle(([PUBLIC], [PRIVATE]))
    zone: dict[str, Callable[[], list[str]]] = {
        **{name: lambda: [PUBLIC] for name in ("registry.test", "closed.test", "hostile.test", "stranger.test")},
        **{name: lambda: [OTHER_PUBLIC] for name in ("auth.test", "blobs.test")},
        "private.test": lambda: [PRIVATE],
        "both.test": lambda: [PRIVATE, PUBLIC],
        "turning.test": lambda: next(turns),
    }
    token_requests: list[str] = []
    token_server = {"realm": "https://auth.test/token", "service": "closed.test", "issuer": "auth.test"}
    async with beyond(folder) as net:
        with net.names(zone) as asked, net.web(AUTH, tokens(server, token_requests), address=OTHER_PUBLIC, tls=tls):
            plain = net.registry(5_000)
            net.registry(TLS, tls=server)
            net.registry(PRIVATE_TLS, address=PRIVATE, tls=server)
            net.registry(
                CLOSED, tls=server, auth={"token": {**token_server, "rootcertbundle": str(folder / "roots.pem")}}
            )
            for one in (TLS, CLOSED, PRIVATE_TLS):
                # All have the same images: what a registry of tokens holds was put there behind its back.
                (folder / f"storage-{one}").symlink_to(folder / "storage-5000")
            net.push(folder / "layout", f"{plain}/team/app:1")
            settings = {
                "host_netns": net.host,
                "dns_upstreams": PUBLIC,
                "registry_ca_file": authorities,
                "import_max_mb": 64,
            }
            async with running_host(home, **settings) as host:
                yield World(host, net, authorities, server, tls, asked, token_requests)
    assert leaks.wait_for_none(home) == []


@pytest.fixture(autouse=True)
async def nothing_left(world: World) -> AsyncIterator[None]:
    yield
    disks = world.host.settings.host_dir / "pool" / "disks"
    assert await eventually(lambda: not list(disks.glob("*.img")))
    assert (await world.host.status())["leaked"] == 0


# --- a token server, as the specification of registries has it ----------------------------------------------------------


def tokens(server: Path, requests: list[str]) -> type[Registry]:
    """Gives robot, with its password, tokens that the registry trusts; notes what it is asked, and with which password."""
    pem = server.read_bytes()
    key = serialization.load_pem_private_key(pem, None)
    certificate = x509.load_pem_x509_certificate(pem[pem.index(b"-----BEGIN CERT") :])
    assert isinstance(key, ec.EllipticCurvePrivateKey)

    def token(service: str, scopes: list[str]) -> str:
        now = int(time.time())
        access = []
        for kind, name, actions in (scope.split(":") for scope in scopes):
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        der = certificate.public_bytes(serialization.Encoding.DER)
        head = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        claims = {"iss": "auth.test", "sub": "robot", "aud": service, "jti": str(now), "access": access}
        claims |= {"exp": now + 300, "nbf": now - 60, "iat": now}
        signed = b".".join(_base64(json.dumps(part).encode()) for part in (head, claims))
        r, s = utils.decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA256())))
        return b".".join((signed, _base64(r.to_bytes(32, "big") + s.to_bytes(32, "big")))).decode()

    class Tokens(Registry):
        def answer(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            given = base64.b64decode(self.headers.get("Authorization", "Basic ").partition(" ")[2]).decode()
            requests.append(f"{self.headers['Host']} {given}")
            if given != f"robot:{PASSWORD}":
                self.say(401, b'{"errors": [{"code": "UNAUTHORIZED", "message": "who are you"}]}')
                return
            self.say(200, json.dumps({"token": token(query["service"][0], query.get("scope", []))}).encode())

    return Tokens


def _base64(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")


# --- names and certificates ---------------------------------------------------------------------------------------------


async def test_by_name_behind_the_operator_s_own_authority(world: World) -> None:
    made = await import_reference(world.host, "registry.test/team/app:1")
    assert world.content(made.digest) == "by name"
    assert "registry.test" in world.asked
    print(f"import by name over TLS {made.seconds:.1f} s")


async def test_authorities_that_nobody_named_are_refused(world: World, tmp_path: Path) -> None:
    own, self_signed = certificates(tmp_path, NAMES)
    asked: list[str] = []

    class Noting(Registry):
        def answer(self) -> None:
            asked.append(self.path)
            self.say(200, b"{}")

    with world.net.web(HOSTILE, Noting, tls=own):
        with pytest.raises(
            InvalidRequestError, match=r"signed by unknown authority.*\. The operator of the host can name"
        ):
            await import_reference(world.host, f"hostile.test:{HOSTILE}/x/y:1")
        # A name that the certificate is not for is no better than an authority that nobody knows.
        with pytest.raises(InvalidRequestError, match=r"certificate is valid for .* not stranger\.test"):
            await import_reference(world.host, "stranger.test/team/app:1")
    assert asked == []
    # What the file holds counts from one import to the next: another authority, several, none at all.
    kept = world.authorities.read_bytes()
    try:
        world.authorities.write_bytes(self_signed)
        with pytest.raises(InvalidRequestError, match="signed by unknown authority"):
            await import_reference(world.host, "registry.test/team/app:1")
        world.authorities.write_bytes(world.server.read_bytes() + self_signed + kept)
        await import_reference(world.host, "registry.test/team/app:1")
        world.authorities.write_bytes(b"no certificate")
        with pytest.raises(UnavailableError, match="holds no certificate"):
            await import_reference(world.host, "registry.test/team/app:1")
        world.authorities.unlink()
        with pytest.raises(UnavailableError, match="cannot be read: No such file"):
            await import_reference(world.host, "registry.test/team/app:1")
    finally:
        world.authorities.write_bytes(kept)


async def test_names_of_private_addresses_and_no_names(world: World) -> None:
    for reference, reason in (
        (f"private.test:{PRIVATE_TLS}/team/app:1", r"private\.test:444 has no public address"),
        ("nosuch.test/team/app:1", r"nosuch\.test: its address cannot be found"),
        (f"{'a' * 60}.{'b' * 60}.{'c' * 60}.{'d' * 60}.{'e' * 10}.test/team/app:1", "not a host|registry"),
    ):
        with pytest.raises(InvalidRequestError, match=reason):
            await import_reference(world.host, reference)
    assert world.private_requests() == 0


async def test_of_several_addresses_only_the_public_are_dialled(world: World) -> None:
    made = await import_reference(world.host, "both.test/team/app:1")
    assert world.content(made.digest) == "by name"
    # The same port on the private address is not that registry's: nobody listened there, so prove it with one where somebody does.
    with pytest.raises(InvalidRequestError, match=rf"both\.test:{PRIVATE_TLS} does not answer"):
        await import_reference(world.host, f"both.test:{PRIVATE_TLS}/team/app:1")
    assert world.private_requests() == 0


async def test_a_name_that_turns_private_between_two_questions(world: World) -> None:
    """Each connection looks the name up for itself and dials what it found: public ones are made, private ones refused."""
    began = len(world.asked)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=r"turning\.test:\d+ (has no public address|does not answer)"):
            await import_reference(world.host, f"turning.test:{PRIVATE_TLS}/team/app:1")
    assert world.asked[began:].count("turning.test") >= 2
    assert world.private_requests() == 0


# --- redirects and tokens -----------------------------------------------------------------------------------------------


def an_image() -> dict[str, bytes]:
    layout = oci.Layout()
    return layout.index(layout.image([layer([("hello", file(str(time.monotonic()).encode()))])])).files


@pytest.mark.parametrize("where", ["blobs.test", f"private.test:{PRIVATE_TLS}", f"{PRIVATE}:{PRIVATE_TLS}"])
async def test_blobs_on_another_host(world: World, where: str) -> None:
    files = an_image()

    def away(self: Registry, _: bytes) -> None:
        self.say(307, b"", Location=f"https://{where}:{HOSTILE}{self.path}" if where == "blobs.test" else f"https://{where}{self.path}")  # fmt: skip

    def here(self: Registry, blob: bytes) -> None:
        self.say(200, blob, "application/octet-stream")

    with (
        world.net.web(HOSTILE, serving(files, answer=away), tls=world.tls),
        world.net.web(HOSTILE, serving(files, answer=here), address=OTHER_PUBLIC, tls=world.tls),
    ):
        if where == "blobs.test":
            await import_reference(world.host, f"hostile.test:{HOSTILE}/x/y:1")
            assert "blobs.test" in world.asked
        else:
            with pytest.raises(InvalidRequestError, match=f"{where} has no public address"):
                await import_reference(world.host, f"hostile.test:{HOSTILE}/x/y:1")
    assert world.private_requests() == 0


async def test_tokens_of_another_host(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    reference = f"closed.test:{CLOSED}/team/app:1"
    for username, password in ((None, None), ("robot", "hunter2-wrong")):
        with pytest.raises(InvalidRequestError, match=r"unauthorized|authentication required|who are you"):
            await import_reference(world.host, reference, username, password)
    made = await import_reference(world.host, reference, "robot", PASSWORD)
    assert world.content(made.digest) == "by name"
    assert f"auth.test robot:{PASSWORD}" in world.token_requests
    captured = capfd.readouterr()
    assert "hunter2" not in captured.out + captured.err + str(made)


async def test_a_token_server_on_a_private_address_gets_no_password(world: World) -> None:
    class Asking(Registry):
        def answer(self) -> None:
            realm = f'Bearer realm="https://private.test:{PRIVATE_TLS}/token",service="x"'
            self.say(401, b"{}", WWW_Authenticate=realm)

    with world.net.web(HOSTILE, Asking, tls=world.tls), pytest.raises(InvalidRequestError, match=r"private\.test:444 has no public"):  # fmt: skip
        await import_reference(world.host, f"hostile.test:{HOSTILE}/x/y:1", "robot", PASSWORD)
    assert world.private_requests() == 0
