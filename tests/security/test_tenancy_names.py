"""What two organizations call the same: numbers of keys, idempotency keys, names of terminals. Each means its own, and nothing of the other is told or changed.

Ids that only one thing has are the matter of `test_tenancy.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.published_port import Published, published
from tests.security.test_hostile_websockets import BINARY, dialled, upgrade, works
from tests.security.test_tenancy import CLIENT, VM, Matrix, Tenant, matrix, wire

from innkeeper.control import organizations, ssh_keys, tokens
from innkeeper.core.token import DEFAULT_SCOPES, Principal, Scope

__all__ = ["matrix"]
pytestmark = pytest.mark.anyio

NOBODYS_NUMBER = 1_000_000


async def send(matrix: Matrix, tenant: Tenant, method: str, path: str, **more: object) -> httpx2.Response:
    """A request of a tenant's, past the matrix of routes."""
    transport = httpx2.ASGITransport(app=matrix.app, client=CLIENT)  # type: ignore[arg-type]
    headers = {"Authorization": f"Bearer {tenant.token}", **more.pop("headers", {})}  # type: ignore[dict-item]
    async with httpx2.AsyncClient(transport=transport, base_url="http://inn", headers=headers) as client:
        return await client.request(method, path, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_a_token_by_its_number(matrix: Matrix, method: str) -> None:
    """Numbers are within an organization: one that only the other one has is nobody's."""
    made = [await tokens.create(matrix.world.control, matrix.mine.principal, f"key {n}") for n in range(40)]
    number = made[-1].token.number
    before = await matrix.state()
    body = {"json": {"description": "owned"}} if method == "PATCH" else {}
    told = await send(matrix, matrix.theirs, method, f"/v1/api-keys/{number}", **body)
    assert told.status_code == 404 and told.json()["detail"]
    assert wire(told) == wire(await send(matrix, matrix.theirs, method, f"/v1/api-keys/{NOBODYS_NUMBER}", **body))
    assert await matrix.state() == before
    assert (await send(matrix, matrix.mine, method, f"/v1/api-keys/{number}", **body)).status_code == 200


async def test_an_ssh_key_by_its_number(matrix: Matrix) -> None:
    for _ in range(20):
        public = Ed25519PrivateKey.generate().public_key()
        key = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        number = (await ssh_keys.add(matrix.world.control, matrix.mine.principal, key)).number
    before = await matrix.state()
    told = await send(matrix, matrix.theirs, "DELETE", f"/v1/ssh-keys/{number}")
    assert told.status_code == 404 and told.json()["detail"]
    assert wire(told) == wire(await send(matrix, matrix.theirs, "DELETE", f"/v1/ssh-keys/{NOBODYS_NUMBER}"))
    assert await matrix.state() == before
    assert key not in (await send(matrix, matrix.theirs, "GET", "/v1/ssh-keys")).text
    assert (await send(matrix, matrix.mine, "DELETE", f"/v1/ssh-keys/{number}")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [("/v1/vms", {}, "vm_id"), ("/v1/sessions/session", {}, "session_id"), ("/v1/api-keys/", {"description": "d"}, "key")],
)  # fmt: skip
async def test_an_idempotency_key_is_each_organizations_own(
    matrix: Matrix, path: str, body: dict[str, str], name: str
) -> None:
    """The same request with the same key, of two: each is carried out, and neither gets what the other was answered."""
    headers = {"Idempotency-Key": f"the same {uuid4()}"}
    answers = [
        await send(matrix, tenant, "POST", path, json=body, headers=dict(headers))
        for tenant in (matrix.mine, matrix.theirs, matrix.mine, matrix.theirs)
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, None, "true", "true"]
    mine, theirs = answers[0].json(), answers[1].json()
    assert str(mine) != str(theirs)
    if name in mine:
        assert mine[name] != theirs[name]
    assert [answer.json() for answer in answers[2:]] == [mine, theirs]


async def test_a_terminal_of_the_same_name(matrix: Matrix) -> None:
    """A name says which of the VM's own terminals: of somebody else's VM there is none."""
    mine, theirs = await matrix.objects(matrix.mine), await matrix.objects(matrix.theirs)
    for leaf in ("sessions/{pid}", "{pid}/connect"):
        path = f"{VM}/pty/{leaf}"
        told = await send(matrix, matrix.theirs, "GET", path.format_map({**theirs, "pid": mine["pid"]}))
        assert told.status_code == 404 and told.json()["detail"]
        nobodys = await send(matrix, matrix.theirs, "GET", path.format_map({**theirs, "pid": "nobodys"}))
        assert wire(told) == wire(nobodys)


@dataclass
class Strangers:
    """A room with a terminal, and tokens that must not get there."""

    served: Published
    other_organization: str
    without_scope: str
    revoked: str


@pytest.fixture(scope="module")
async def strangers(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Strangers]:
    async with published(tmp_path_factory.mktemp("strangers")) as served:
        served.world.host.terminals.add(served.entry.instance.id, "t")
        control, me = served.control, replace(served.me, scopes=frozenset(Scope))
        other = await organizations.create(control, served.world.operator, "theirs")
        them = Principal(other.id, None, DEFAULT_SCOPES, "token:theirs")
        narrow = await tokens.create(control, me, "narrow", scopes=frozenset(Scope) - {Scope.ROOMS, Scope.ADMIN})
        revoked = await tokens.create(control, me, "revoked")
        await tokens.revoke(control, me, revoked.token.id)
        yield Strangers(served, (await tokens.create(control, them, "t")).text, narrow.text, revoked.text)


async def answered(served: Published, token: str, *, in_query: bool, room: UUID | None = None) -> bytes:
    """All that one gets who asks for the terminal's WebSocket, but for the date and the request's id."""
    head = upgrade(served, X_API_Key=None if in_query else token, query=f"?api_key={token}" if in_query else "")
    if room is not None:
        head = head.replace(str(served.entry.instance.public_id).encode(), str(room).encode())
    async with dialled(served) as client:
        client.writer.write(head)
        said = await client.head()
        lines = [line for line in said.split(b"\r\n") if not line.lower().startswith((b"date:", b"x-request-id:"))]
        if b" 101 " in said:
            return b"close %d" % await client.closed()
        size = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
        return b"\r\n".join(lines) + await client.reader.readexactly(size)


@pytest.mark.parametrize("in_query", [False, True], ids=["header", "query"])
async def test_a_stranger_opens_no_terminal(strangers: Strangers, in_query: bool) -> None:
    served = strangers.served
    told = await answered(served, strangers.other_organization, in_query=in_query)
    assert told.startswith(b"HTTP/1.1 404 ") and b'"detail"' in told
    # As if there were no such room at all.
    assert told == await answered(served, strangers.other_organization, in_query=in_query, room=uuid4())
    told = await answered(served, strangers.without_scope, in_query=in_query)
    assert told.startswith(b"HTTP/1.1 403 ") and b'"detail"' in told
    assert await answered(served, strangers.revoked, in_query=in_query) == b"close 4401"
    await works(served)


async def test_who_loses_its_token_is_not_believed_again(strangers: Strangers) -> None:
    """A key that was good for one connection is none for the next, once it is revoked."""
    served, control = strangers.served, strangers.served.control
    me = replace(served.me, scopes=frozenset(Scope))
    made = await tokens.create(control, me, "soon revoked")
    async with dialled(served) as client:
        client.writer.write(upgrade(served, X_API_Key=made.text))
        assert await client.status() == 101
        client.send(BINARY, b"echo")
        assert await client.frame() == (BINARY, b"echo")
        await tokens.revoke(control, me, made.token.id)
        assert await answered(served, made.text, in_query=True) == b"close 4401"
