"""Who may ask what, over every route that the application has: a route without an entry here fails the first test.

The real application over the real control side and database; the host follows a script, since nothing here may get as far as a guest.
"""

from __future__ import annotations

import asyncio
import string
from collections.abc import AsyncIterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
import sqlalchemy as sa
from tests.scripted_host import World

from innkeeper.api.app import build_app
from innkeeper.api.edge import Edge
from innkeeper.api.port_proxy.app_paths import METHODS as APP_METHODS
from innkeeper.api.server import UnixSocketOperator
from innkeeper.control import audit, clock, images, lifecycle, organizations, registries, ssh_keys, tokens
from innkeeper.control.reconciler import system_principal
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.image import ImageSource
from innkeeper.core.image_build import BuildStatus, ImageBuild
from innkeeper.core.image_config import ImageConfig
from innkeeper.core.token import DEFAULT_SCOPES, Principal, Scope
from innkeeper.store import image_builds, tables

pytestmark = pytest.mark.anyio

CLIENT = ("192.0.2.9", 4321)
UNKNOWN_TOKEN = "rk_live_" + "0" * 32
ANYBODY = frozenset[Scope]()
ANY_TOKEN = frozenset(Scope)
OPERATOR = frozenset({Scope.ADMIN})
# No token at all, whatever its scopes: the operator on the unix socket alone.
NOBODY = None
ROOMS = frozenset({Scope.ROOMS})
PROFILES = frozenset({Scope.PROFILES})
TOKENS = frozenset({Scope.TOKENS})
AUDIT = frozenset({Scope.AUDIT})
READERS = ROOMS | PROFILES


@dataclass(frozen=True)
class Entry:
    """Any one of `scopes` opens the route (`admin` always does), which then answers with `status`; ANYBODY needs no token."""

    scopes: frozenset[Scope] | None
    status: int = 200
    json: Mapping[str, Any] | None = None
    content: bytes | None = None
    query: Mapping[str, str] | None = None
    content_type: str | None = None
    # The answer holds what is everybody's, or is the operator's alone: other organizations may be in it.
    shared: bool = False
    # The answer goes on until the guest says that it is over, which it does at once.
    ends: bool = False


SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA" + "A" * 42 + " of the test"
PAIRING = {"state": "12345678", "code_challenge": "A" * 43, "redirect_uri": "http://127.0.0.1:1/callback"}
Route = tuple[str, str]
ROOM = "/api/profile/{profile_id}/room/{room_id}"
PROFILE = "/api/profile/{profile_id}"
PUBLIC = "/vm/{instance_id}/file/{path}"
VM = "/v1/vms/{vm_id}"
VOLUME = "/v1/volumes/{volume_id}"
APP = "/v1/app/{session}/{port}/{path}"
FILES = f"{VM}/files"
AT = {"path": "/tmp/a"}
IN_VOLUME = {"path": "a"}
VOLUME_UPLOAD = b'--b\r\nContent-Disposition: form-data; name="path"\r\n\r\nnew\r\n--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nnew\r\n--b--\r\n'
UPLOAD = (
    b"".join(
        b'--b\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n' + value + b"\r\n"
        for name, value in ((b"session_id", b"{session}"), (b"remote_path", b"/tmp/new"), (b"file", b"new"))
    )
    + b"--b--\r\n"
)
MATRIX: dict[Route, Entry] = {
    ("POST", ROOM): Entry(ROOMS),
    ("DELETE", ROOM): Entry(ROOMS, status=204),
    ("POST", f"{ROOM}/command"): Entry(ROOMS, json={"command": "true"}),
    ("GET", f"{ROOM}/command/{{execution_id}}/output"): Entry(ROOMS),
    ("GET", f"{ROOM}/command/{{execution_id}}/files_changed"): Entry(ROOMS),
    ("GET", f"{ROOM}/file/{{path}}"): Entry(ROOMS),
    ("PUT", f"{ROOM}/file/{{path}}"): Entry(ROOMS, content=b"new"),
    ("GET", f"{ROOM}/files/{{path}}"): Entry(ROOMS),
    ("GET", f"{ROOM}/tools"): Entry(ROOMS),
    ("GET", "/api/profiles"): Entry(READERS),
    ("POST", "/api/profiles"): Entry(PROFILES, status=201, json={"name": "made", "image": "base"}),
    ("GET", PROFILE): Entry(READERS),
    ("PATCH", PROFILE): Entry(PROFILES, json={"memory_mb": 600}),
    ("DELETE", PROFILE): Entry(PROFILES, status=409),  # it has rooms
    ("GET", f"{PROFILE}/rooms"): Entry(ROOMS),
    ("GET", "/v1/organizations"): Entry(OPERATOR, shared=True),
    ("POST", "/v1/organizations"): Entry(OPERATOR, status=201, json={"name": "made"}, shared=True),
    ("PATCH", "/v1/organizations/{name}"): Entry(OPERATOR, json={"max_instances": 100_000}, shared=True),
    ("GET", "/v1/tokens"): Entry(TOKENS),
    ("POST", "/v1/tokens"): Entry(TOKENS, status=201, json={"name": "made", "scopes": ["tokens"]}),
    ("DELETE", "/v1/tokens/{token_id}"): Entry(TOKENS, status=204),
    ("GET", "/api/tokens"): Entry(TOKENS),
    ("POST", "/api/tokens"): Entry(TOKENS, json={"name": "made"}),
    ("DELETE", "/api/tokens/{token_id}"): Entry(TOKENS),
    ("GET", "/v1/agents"): Entry(READERS, shared=True),
    ("GET", "/v1/images"): Entry(READERS),
    ("GET", "/v1/images/{name}"): Entry(READERS),
    ("DELETE", "/v1/images/{name}"): Entry(PROFILES, status=204),
    ("POST", "/v1/images"): Entry(PROFILES, status=202, json={"name": "made", "reference": "r.example/a"}),
    ("PUT", "/v1/images/{name}/archive"): Entry(PROFILES, status=202, content=b"x"),
    ("GET", "/v1/images/{name}/import/events"): Entry(READERS),
    ("DELETE", "/v1/images/{name}/import"): Entry(PROFILES, status=204),
    ("GET", "/v1/registries"): Entry(PROFILES),
    ("PUT", "/v1/registries/{registry}"): Entry(PROFILES, json={"username": "u", "password": "p"}),
    ("DELETE", "/v1/registries/{registry}"): Entry(PROFILES, status=204),
    ("POST", "/v1/image-gc"): Entry(OPERATOR, json={}, shared=True),
    ("GET", "/v1/image-builds"): Entry(PROFILES),
    ("POST", "/v1/image-builds"): Entry(PROFILES, status=201, json={"name": "made", "dockerfile": "FROM base"}),
    ("GET", "/v1/image-builds/{build_id}"): Entry(PROFILES),
    ("GET", "/v1/image-builds/{build_id}/events"): Entry(PROFILES),
    ("PUT", "/v1/image-builds/{build_id}/context"): Entry(PROFILES, status=409, content=b"x"),  # it has ended
    ("POST", "/v1/image-builds/{build_id}/cancel"): Entry(PROFILES, json={}),
    ("POST", "/v1/vms"): Entry(ROOMS, json={}),
    ("GET", "/v1/vms"): Entry(ROOMS),
    ("GET", "/v1/vms/"): Entry(ROOMS),
    ("GET", VM): Entry(ROOMS),
    ("PATCH", VM): Entry(ROOMS, json={"metadata": {"a": 1}}),
    ("DELETE", VM): Entry(ROOMS),
    ("POST", f"{VM}/hold"): Entry(ROOMS, json={"seconds": 5}),
    ("POST", f"{VM}/suspend"): Entry(ROOMS),
    ("POST", f"{VM}/clone"): Entry(ROOMS, json={}),
    ("POST", f"{VM}/fork"): Entry(ROOMS, json={"count": 1}),
    ("POST", f"{VM}/resume"): Entry(ROOMS),
    ("POST", f"{VM}/stage-env"): Entry(ROOMS, json={"entries": [{"env_name": "A", "value": "b"}]}),
    ("GET", f"{VM}/events"): Entry(ROOMS),
    ("GET", f"{VM}/logs"): Entry(ROOMS),
    ("GET", f"{VM}/logs/stream"): Entry(ROOMS, ends=True),
    ("GET", "/v1/rooms/{instance_id}/logs"): Entry(ROOMS),
    ("GET", "/v1/rooms/{instance_id}/logs/stream"): Entry(ROOMS, ends=True),
    ("GET", f"{VM}/events/stream"): Entry(ROOMS, ends=True),
    ("GET", FILES): Entry(ROOMS, query=AT),
    ("DELETE", FILES): Entry(ROOMS, query=AT),
    **{("GET", f"{FILES}/{leaf}"): Entry(ROOMS, query=AT) for leaf in ("stat", "content", "archive")},
    ("HEAD", f"{FILES}/content"): Entry(ROOMS, query=AT),
    ("GET", f"{FILES}/glob"): Entry(ROOMS, query={"path": "/tmp", "pattern": "*"}),
    ("GET", f"{FILES}/search"): Entry(ROOMS, query={"path": "/tmp", "query": "x"}),
    ("GET", f"{FILES}/watch"): Entry(ROOMS, query={"path": "/tmp"}, ends=True),
    ("PUT", f"{FILES}/content"): Entry(ROOMS, query=AT, content=b"new"),
    ("PUT", f"{FILES}/archive"): Entry(ROOMS, query={"path": "/tmp"}, content=b"new"),
    ("POST", f"{FILES}/mkdir"): Entry(ROOMS, status=201, json={"path": "/tmp/d"}),
    ("POST", f"{FILES}/rename"): Entry(ROOMS, json={"path": "/tmp/a", "to": "/tmp/b"}),
    ("POST", f"{FILES}/copy"): Entry(ROOMS, status=201, json={"path": "/tmp/a", "to": "/tmp/c"}),
    ("GET", f"{VOLUME}/files"): Entry(ROOMS),
    ("DELETE", f"{VOLUME}/files"): Entry(ROOMS, query=IN_VOLUME),
    **{(method, f"{VOLUME}/files/content"): Entry(ROOMS, query=IN_VOLUME) for method in ("GET", "HEAD")},
    ("PUT", f"{VOLUME}/files/content"): Entry(ROOMS, query=IN_VOLUME, content=b"new"),
    ("POST", f"{VOLUME}/files/download"): Entry(ROOMS, json=IN_VOLUME),
    ("POST", f"{VOLUME}/files/upload"): Entry(
        ROOMS, content=VOLUME_UPLOAD, content_type="multipart/form-data; boundary=b"
    ),
    ("POST", "/upload"): Entry(ROOMS, content=UPLOAD, content_type="multipart/form-data; boundary=b"),
    ("POST", "/download"): Entry(
        ROOMS, content=b"filename=/tmp/a&session_id={session}", content_type="application/x-www-form-urlencoded"
    ),
    ("POST", f"{VM}/exec"): Entry(ROOMS, json={"command": "true"}),
    ("GET", f"{VM}/executions"): Entry(ROOMS),
    ("POST", "/execute"): Entry(ROOMS, json={"command": "1", "session_id": "{session}"}),
    ("POST", "/execute_async"): Entry(ROOMS, json={"command": "1", "session_id": "{session}"}),
    ("GET", "/v1/executions/{task_id}"): Entry(ROOMS),
    ("GET", "/v1/executions/{task_id}/stream"): Entry(ROOMS),
    ("GET", "/v1/executions/{task_id}/output"): Entry(ROOMS),
    ("GET", "/v1/executions/{task_id}/files_changed"): Entry(ROOMS),
    ("POST", "/v1/executions/{task_id}/signal"): Entry(ROOMS, json={"signal": "TERM"}),
    ("POST", "/v1/sessions/session"): Entry(ROOMS, json={}),
    ("GET", "/v1/sessions/session/{session}"): Entry(ROOMS),
    ("GET", "/v1/sessions/status/{session}"): Entry(ROOMS),
    ("GET", "/v1/sessions/usage/{session}"): Entry(ROOMS),
    ("GET", "/v1/sessions/sandboxes"): Entry(ROOMS),
    ("GET", "/v1/sessions/app-url/{session}"): Entry(ROOMS),
    ("GET", f"{VM}/ports"): Entry(ROOMS),
    ("POST", "/v1/shares"): Entry(ROOMS, json={"port": 80, "vm_id": "{vm_id}"}),
    ("GET", "/v1/shares"): Entry(ROOMS),
    **{(method, "/v1/shares/{share_id}"): Entry(ROOMS) for method in ("GET", "DELETE")},
    ("PATCH", "/v1/shares/{share_id}"): Entry(ROOMS, json={"is_public": True}),
    ("POST", "/v1/shares/{share_id}/link"): Entry(ROOMS, json={}),
    # Nothing listens there.
    **{(method, APP): Entry(ROOMS, status=502) for method in APP_METHODS},
    ("POST", f"{VM}/snapshot"): Entry(ROOMS, json={}),
    ("GET", "/v1/snapshots"): Entry(ROOMS),
    ("POST", "/v1/snapshots"): Entry(PROFILES, json={"oci_image": "registry.example.com/a:1"}),
    ("GET", "/v1/snapshots/{snapshot_id}/log"): Entry(ROOMS),
    **{(method, "/v1/snapshots/{snapshot_id}"): Entry(ROOMS) for method in ("GET", "DELETE")},
    ("PATCH", "/v1/snapshots/{snapshot_id}"): Entry(ROOMS, json={"name": "renamed"}),
    ("POST", "/v1/snapshots/{snapshot_id}/verify"): Entry(ROOMS, json={}),
    ("POST", "/v1/volumes"): Entry(ROOMS, json={"name": "made", "quota_bytes": 1 << 27}),
    ("GET", "/v1/volumes"): Entry(ROOMS),
    # Where a VM has it, or a checkpoint stands on it.
    ("GET", VOLUME): Entry(ROOMS),
    ("DELETE", VOLUME): Entry(ROOMS, status=409),
    ("PATCH", VOLUME): Entry(ROOMS, json={"name": "renamed"}),
    ("GET", f"{VOLUME}/checkpoints"): Entry(ROOMS),
    ("POST", f"{VOLUME}/checkpoints"): Entry(ROOMS, json={"name": "made"}),
    ("DELETE", f"{VOLUME}/checkpoints/{{checkpoint_id}}"): Entry(ROOMS),
    ("GET", f"{VM}/volumes"): Entry(ROOMS),
    ("GET", "/v1/retention"): Entry(ROOMS),
    ("PUT", "/v1/retention"): Entry(ROOMS, json={"snapshots": {"max_age_days": 36_500}}),
    ("POST", "/v1/retention/apply"): Entry(ROOMS, json={"remove": True}),
    ("POST", f"{VM}/volumes"): Entry(ROOMS, json={"volume_id": "{volume_id}", "mount_path": "/data"}),
    ("DELETE", f"{VM}/volumes/{{volume_id}}"): Entry(ROOMS),
    ("POST", "/kill"): Entry(ROOMS, json={"session_id": "{session}"}),
    ("GET", "/v1/rooms"): Entry(ROOMS),
    ("GET", "/v1/rooms/{instance_id}"): Entry(ROOMS),
    **{
        (method, f"{base}/pty{path}"): entry
        for base in ("/v1/rooms/{instance_id}", VM, "/v1/sessions/{session}")
        for method, path, entry in (
            ("GET", "/sessions", Entry(ROOMS)),
            ("POST", "/sessions", Entry(ROOMS, status=201, json={})),
            ("GET", "/sessions/{pid}", Entry(ROOMS)),
            ("POST", "/sessions/{pid}/resize", Entry(ROOMS, json={"cols": 9, "rows": 9})),
            ("DELETE", "/sessions/{pid}", Entry(ROOMS)),
            ("GET", "/{pid}/connect", Entry(ROOMS, status=426)),  # no WebSocket is asked for
        )
    },
    ("GET", "/v1/hosts"): Entry(OPERATOR, shared=True),
    ("POST", "/v1/hosts/{host_id}/drain"): Entry(OPERATOR, json={"draining": False}, shared=True),
    ("GET", "/v1/hosts/{host_id}/capacity"): Entry(OPERATOR, shared=True),
    ("GET", "/v1/hosts/{host_id}/disk"): Entry(OPERATOR, shared=True),
    ("POST", "/v1/hosts/{host_id}/gc"): Entry(OPERATOR, json={}, shared=True),
    ("GET", "/v1/audit"): Entry(AUDIT),
    ("GET", "/v1/audit/catalog"): Entry(ANY_TOKEN),
    ("GET", "/v1/audit/events"): Entry(AUDIT),
    ("GET", "/v1/audit/events/{event_id}"): Entry(AUDIT),
    ("GET", "/v1/users/me"): Entry(ANY_TOKEN),
    ("GET", "/v1/users/me/usage-breakdown"): Entry(ROOMS),
    ("GET", "/v1/api-keys/"): Entry(TOKENS),
    ("POST", "/v1/api-keys/"): Entry(TOKENS, json={"description": "made"}),
    **{(method, "/v1/api-keys/{key_id}"): Entry(TOKENS) for method in ("GET", "DELETE")},
    ("PATCH", "/v1/api-keys/{key_id}"): Entry(TOKENS, json={"description": "renamed"}),
    ("GET", "/v1/ssh-keys"): Entry(ROOMS),
    ("GET", "/v1/ssh"): Entry(ANY_TOKEN, shared=True),
    ("POST", "/v1/ssh-keys"): Entry(ROOMS, json={"public_key": SSH_KEY}),
    ("DELETE", "/v1/ssh-keys/{ssh_key_id}"): Entry(ROOMS),
    ("POST", "/v1/diagnosis"): Entry(OPERATOR, json={"kind": "tasks"}, shared=True),
    ("POST", "/v1/backup"): Entry(NOBODY, json={}, shared=True),
    ("GET", "/v1/log-level"): Entry(OPERATOR, shared=True),
    ("PUT", "/v1/log-level"): Entry(OPERATOR, json={"level": "info"}, shared=True),
    **{(method, PUBLIC): Entry(ANYBODY) for method in ("GET", "HEAD")},
    **{(method, path): Entry(ANYBODY) for method in ("GET", "HEAD") for path in ("/healthz", "/openapi.json")},
    # Nobody is known yet: what these give is proven with the pairing's own secrets.
    ("POST", "/api/cli-auth/start"): Entry(ANYBODY, json={**PAIRING, "hostname": "h"}),
    ("POST", "/api/cli-auth/exchange"): Entry(
        ANYBODY, status=404, json={"pairing_id": "x", "code": "", "code_verifier": ""}
    ),
    **{(method, "/cli-login/{pairing_id}"): Entry(ANYBODY, status=404) for method in ("GET", "POST")},
    **{(method, "/metrics"): Entry(ANY_TOKEN, shared=True) for method in ("GET", "HEAD")},
}
# What of a path is an organization's object. Room ids, file paths and the numbers of keys are names within one.
IDS = frozenset(
    {
        "profile_id",
        "execution_id",
        "token_id",
        "instance_id",
        "image",
        "build_id",
        "event_id",
        "vm_id",
        "session",
        "share_id",
        "snapshot_id",
        "task_id",
        "volume_id",
        "checkpoint_id",
    }
)


OF_ROOM = frozenset({"room_id", "instance_id", "execution_id"})
OF_VM = frozenset({"vm_id", "session", "share_id", "snapshot_id", "task_id", "volume_id", "checkpoint_id"})
OBJECTS = OF_ROOM | OF_VM | {"token_id", "key_id", "ssh_key_id", "event_id", "image", "build_id", "registry"}


def named(route: Route) -> str:
    return " ".join(route)


EVERY_ROUTE = pytest.mark.parametrize("route", MATRIX, ids=named)
WITH_A_TOKEN = pytest.mark.parametrize(
    "route", [r for r, entry in MATRIX.items() if entry.scopes != ANYBODY], ids=named
)


@dataclass
class Tenant:
    """An organization with one of everything (`values` fill a path), and a token with every scope that a tenant gets."""

    principal: Principal
    name: str
    token: str
    values: dict[str, str] = field(default_factory=dict)


@dataclass
class Matrix:
    """The application and two tenants: `mine` (the default organization) and `theirs`."""

    app: Edge
    world: World
    mine: Tenant
    theirs: Tenant

    async def narrow_token(self, tenant: Tenant, scope: Scope) -> str:
        """A new token of an organization with this scope alone."""
        by = Principal(tenant.principal.organization_id, None, frozenset(Scope), "operator")
        return (await tokens.create(self.world.control, by, "narrow", scopes=frozenset({scope}))).text

    async def ask(
        self, route: Route, values: Mapping[str, str], token: str | None, *, on_socket: bool = False, **more: Any
    ) -> httpx2.Response:
        method, template = route
        entry = MATRIX[route]
        app: Any = UnixSocketOperator(self.app) if on_socket else self.app
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        transport = httpx2.ASGITransport(app=app, client=CLIENT)
        async with httpx2.AsyncClient(transport=transport, base_url="http://inn", headers=headers) as client:
            path = meant(template).format_map({"port": "9", **values})
            content = entry.content
            if content is not None:
                content = content.replace(b"{session}", values["session"].encode())
            if entry.content_type is not None:
                client.headers["Content-Type"] = entry.content_type
            body = {"json": filled(entry.json, values), "content": content, "params": entry.query}
            if not entry.ends:
                return await client.request(method, path, **{**body, **more})
            self.world.host.trees.events.put_nowait(None)
            ending = asyncio.create_task(self.end_followed())
            try:
                return await client.request(method, path, **{**body, **more})
            finally:
                ending.cancel()

    async def end_followed(self) -> None:
        """End every instance whose events or log somebody follows: the stream would last as long as it does."""
        while True:
            for entry in self.world.control.live:
                told = isinstance(entry, VmEntry) and entry.followers
                if told or entry.instance.id in self.world.control.log_followers:
                    owner = system_principal(entry.instance.organization_id, "test")
                    await lifecycle.destroy(self.world.control, owner, entry)
            await asyncio.sleep(0.01)

    async def objects(self, owner: Tenant, route: Route | None = None) -> dict[str, str]:
        """A new one of everything that a route names; of everything, where there is none. What it does not name are the tenant's older ones."""
        names = OBJECTS if route is None else names_in(route).keys()
        values = {**owner.values, "host_id": str(self.world.host.id), "path": "tmp/a", "pairing_id": "nobodys"}
        values |= {"profile_id": str(self.world.profile_id("base", of=owner.principal)), "organization": owner.name}
        values |= {"new_image": f"new-{uuid4().hex[:8]}", "pid": f"terminal-{uuid4().hex[:8]}"}
        if names & OF_ROOM:
            await self.room(owner, values, names)
        if names & OF_VM:
            await self.vm(owner, values, names)
        if names & {"token_id", "key_id"}:
            new = await tokens.create(self.world.control, owner.principal, f"token of {owner.name}")
            values |= {"token_id": str(new.token.id), "key_id": str(new.token.number)}
        if "ssh_key_id" in names:
            key = await ssh_keys.add(self.world.control, owner.principal, SSH_KEY)
            values["ssh_key_id"] = str(key.number)
        if "event_id" in names:
            (event,) = (await audit.list_events(self.world.control, owner.principal, limit=1)).events
            values["event_id"] = str(event.id)
        for name, make in (("image", self.image), ("build_id", self.build), ("registry", self.registry)):
            if name in names:
                values[name] = await make(owner)
        return values

    async def room(self, owner: Tenant, values: dict[str, str], names: Set[str]) -> None:
        """A room, and what was run in it."""
        values["room_id"] = f"room-{uuid4().hex[:8]}"
        room = (await self.ask(("POST", ROOM), values, owner.token)).json()
        values["instance_id"] = room["instance_id"]
        entry = self.world.control.live.by_public_id(UUID(room["instance_id"]))
        assert entry is not None
        self.furnish(entry.instance.id, owner, values)
        if "execution_id" in names:
            ran = (await self.ask(("POST", f"{ROOM}/command"), values, owner.token)).json()
            values["execution_id"] = ran["result"]["execution_id"]

    async def vm(self, owner: Tenant, values: dict[str, str], names: Set[str]) -> None:
        """A VM, its session, and what stands on them."""
        vm = (await self.ask(("POST", "/v1/vms"), values, owner.token)).json()
        values |= {"vm_id": vm["vm_id"], "session": vm["session_id"]}
        entry = self.world.control.live.find((UUID(vm["session_id"]), ""))
        assert entry is not None
        self.furnish(entry.instance.id, owner, values)
        for name, made_by, found in (
            ("share_id", ("POST", "/v1/shares"), "share_id"),
            ("snapshot_id", ("POST", f"{VM}/snapshot"), "id"),
            ("task_id", ("POST", "/execute_async"), "task_id"),
        ):
            if name in names:
                values[name] = (await self.ask(made_by, values, owner.token)).json()[found]
        if names & {"volume_id", "checkpoint_id"}:
            for name, made_by in (
                ("volume_id", ("POST", "/v1/volumes")),
                ("checkpoint_id", ("POST", f"{VOLUME}/checkpoints")),
            ):
                answer = await self.ask(made_by, values, owner.token)
                assert answer.status_code == 200, answer.text
                values[name] = answer.json()["id"]
            assert (await self.ask(("POST", f"{VM}/volumes"), values, owner.token)).status_code == 200
            self.world.host.files[entry.instance.id, "/data/a"] = f"volume of {owner.name}".encode()

    def furnish(self, instance_id: UUID, owner: Tenant, values: Mapping[str, str]) -> None:
        """Put a file and a terminal into an instance."""
        self.world.host.files[instance_id, "/tmp/a"] = f"content of {owner.name}".encode()
        self.world.host.terminals.add(instance_id, values["pid"], label=f"of {owner.name}")

    async def image(self, owner: Tenant) -> str:
        """The name of an image of the organization's own."""
        control, name, source = self.world.control, f"image-{uuid4().hex[:8]}", ImageSource.BUILD
        image = await images.begin(control, owner.principal, name, source=source, source_ref=None)
        what = {"digest": uuid4().hex, "size_bytes": 1, "config": ImageConfig(), "source": source, "source_ref": None}
        await images.complete(control, image, **what)
        return name

    async def registry(self, owner: Tenant) -> str:
        """A registry that the organization has a credential for."""
        name = f"{uuid4().hex[:8]}.example"
        await registries.log_in(self.world.control, owner.principal, name, "robot", "secret")
        return name

    async def build(self, owner: Tenant) -> str:
        """The id of a build of the organization's own, which has ended."""
        begun, build_id = clock.now(), uuid4()
        build = ImageBuild(build_id, owner.principal.organization_id, f"of-{owner.name}", BuildStatus.FAILED, begun)
        await self.world.control.database.write(image_builds.insert, build)
        return str(build_id)

    async def state(self) -> dict[str, Any]:
        """Everything that a request could have changed, but for the times of use that every look changes."""
        while self.world.control.forking or self.world.control.snapshot_builds:
            # A fork's moment goes after the answer, and a build ends after it.
            await asyncio.sleep(0.01)
        await self.world.control.later.flush(self.world.control)

        def read(connection: sa.Connection) -> dict[str, Any]:
            found = {}
            for table in tables.metadata.sorted_tables:
                columns = [column for column in table.columns if not column.name.startswith("last_")]
                found[table.name] = sorted(map(repr, connection.execute(sa.select(*columns))))
            return found

        host, control = self.world.host, self.world.control
        stored = await self.world.control.database.read(read)
        return {**stored, "machines": repr(host.machines), "files": repr(host.files), "level": control.log_level.name}

    async def forget_names(self) -> None:
        """Give back the names that requests took, so that the next one may take them again."""
        for live in list(self.world.control.builds.values()):
            live.scope.cancel()
            await live.ended.wait()
        for image in self.world.control.images:
            running = self.world.control.imports.of(image.id)
            if running is not None:
                await running.ended.wait()

        def change(connection: sa.Connection) -> None:
            for table in (tables.profiles, tables.organizations, tables.images):
                connection.execute(sa.update(table).where(table.c.name == "made").values(name=f"old-{uuid4().hex[:8]}"))

        await self.world.control.database.write(change)


@pytest.fixture(scope="module")
async def matrix(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Matrix]:
    """One for all: what a test may have removed it made itself."""
    world = World(tmp_path_factory.mktemp("home"))
    limits = {"public_files_per_minute": 100_000, "max_volumes": 100_000, "max_snapshots": 100_000}
    async with world.running(vm_lifetime_seconds=86_400, **limits) as control:
        world.control = control
        other = await organizations.create(control, world.operator, "theirs")
        principals = {"default": world.me.organization_id, "theirs": other.id}
        both = []
        for name, organization_id in principals.items():
            principal = Principal(organization_id, None, DEFAULT_SCOPES, f"token:{name}")
            token = await tokens.create(control, principal, "everything")
            both.append(Tenant(principal, name, token.text))
        made = Matrix(build_app(control), world, *both)
        for one in both:
            one.values = await made.objects(one)
        yield made


def filled(body: Any, values: Mapping[str, str]) -> Any:
    """The body, in which a `{name}` that stands alone is an object's id."""
    if body is None:
        return None
    return {
        key: values[value[1:-1]] if isinstance(value, str) and value.startswith("{") else value
        for key, value in body.items()
    }


def absent(values: Mapping[str, str], *names: str) -> dict[str, str]:
    """The values with ids that nobody has in the place of the named ones."""
    return {**values, **{name: str(uuid4()) for name in names}}


def meant(template: str) -> str:
    """The template with the name of what `{name}` is a name of."""
    if template.endswith("/archive"):
        # It makes an image of one's own, under whatever name.
        return template.replace("{name}", "{new_image}")
    return template.replace("{name}", "{image}" if template.startswith("/v1/images/") else "{organization}")


def names_in(route: Route) -> dict[str, None]:
    """What a request is about, by the path and the body, in their order."""
    entry = MATRIX[route]
    values = [value for value in (entry.json or {}).values() if isinstance(value, str)]
    template = "".join([meant(route[1]), *values, "{session}" if b"{session}" in (entry.content or b"") else ""])
    return {name: None for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def ids_in(route: Route) -> list[str]:
    return [name for name in names_in(route) if name in IDS]


def wire(answer: httpx2.Response) -> tuple[int, bytes, list[tuple[str, str]]]:
    """What a client sees of an answer, but for the id of its request."""
    headers = sorted((name, value) for name, value in answer.headers.items() if name != "x-request-id")
    return answer.status_code, answer.content, headers


def check_shape(route: Route, answer: httpx2.Response, code: str) -> None:
    if route[0] == "HEAD":
        return
    body = answer.json()
    if route[1].startswith("/api/tokens"):
        # Gentity's errors have no code.
        assert set(body) == {"error"}, body
        return
    fields = (
        {"detail", "code"}
        if route[1].startswith(("/v1/", "/execute", "/kill", "/upload", "/download"))
        else {"error", "message"}
    )
    assert set(body) == fields and code in body.values(), body


async def test_every_route_has_an_entry(matrix: Matrix) -> None:
    assert matrix.app.routes == set(MATRIX)


@WITH_A_TOKEN
async def test_without_a_valid_token_nothing_is_told_or_done(matrix: Matrix, route: Route) -> None:
    revoked = await tokens.create(matrix.world.control, matrix.mine.principal, "revoked")
    await tokens.revoke(matrix.world.control, matrix.mine.principal, revoked.token.id)
    before = await matrix.state()
    nobodys = absent(matrix.mine.values, *ids_in(route))
    told = [
        wire(await matrix.ask(route, values, token))
        for token in (None, UNKNOWN_TOKEN, revoked.text, "nonsense", "x" * 5_000)
        for values in (matrix.mine.values, nobodys)
    ]
    assert {status for status, _, _ in told} == {401}
    # Nobody learns whether a token is unknown or revoked, nor whether the object is there.
    assert all(one == told[0] for one in told)
    check_shape(route, await matrix.ask(route, matrix.mine.values, None), "unauthorized")
    assert await matrix.state() == before


@EVERY_ROUTE
async def test_each_scope_opens_what_it_should(matrix: Matrix, route: Route) -> None:
    entry = MATRIX[route]
    opening = set(Scope) if entry.scopes == ANYBODY else set() if entry.scopes is None else entry.scopes | OPERATOR
    for scope in set(Scope) - opening:
        token = await matrix.narrow_token(matrix.mine, scope)
        before = await matrix.state()
        refused = await matrix.ask(route, matrix.mine.values, token)
        assert refused.status_code == 403, (scope, refused.text)
        check_shape(route, refused, "forbidden")
        # Who lacks the scope does not learn what is there either.
        nobodys = absent(matrix.mine.values, *IDS, "organization")
        assert wire(await matrix.ask(route, nobodys, token)) == wire(refused), scope
        assert await matrix.state() == before
    for scope in opening:
        values = await matrix.objects(matrix.mine, route)
        answer = await matrix.ask(route, values, await matrix.narrow_token(matrix.mine, scope))
        assert answer.status_code == entry.status, (scope, answer.text)
        await matrix.forget_names()
    values = await matrix.objects(matrix.mine, route)
    assert (await matrix.ask(route, values, None, on_socket=True)).status_code == entry.status
    if entry.scopes != ANYBODY:
        # A token on the operator's socket stands for itself, not for the operator.
        assert (await matrix.ask(route, values, UNKNOWN_TOKEN, on_socket=True)).status_code == 401


@WITH_A_TOKEN
async def test_another_organizations_objects_look_absent(matrix: Matrix, route: Route) -> None:
    entry, names = MATRIX[route], ids_in(route)
    mine = matrix.mine
    everyones = ("path", "organization", "host_id", "key_id", "ssh_key_id")
    secrets = [value for name, value in mine.values.items() if name not in everyones]
    secrets += ["content of default", "token of default", str(mine.principal.organization_id)]
    for token in (matrix.theirs.token, await matrix.narrow_token(matrix.theirs, Scope.ADMIN)):
        before = await matrix.state()
        # Each id for itself among their own, as in "my room, your command", and all of them.
        for exchanged in [{name} for name in names] + [{*names, "room_id"}] * bool(names):
            asked = {**matrix.theirs.values, **{name: mine.values[name] for name in exchanged}}
            answer = await matrix.ask(route, asked, token)
            assert answer.status_code == 404, (exchanged, answer.text)
            nobodys = absent(asked, *(exchanged & IDS))
            assert wire(answer) == wire(await matrix.ask(route, nobodys, token)), exchanged
        assert await matrix.state() == before
        # What they are given of their own holds nothing of ours.
        if not entry.shared:
            answer = await matrix.ask(route, await matrix.objects(matrix.theirs, route), token)
            assert answer.status_code == entry.status
            assert [secret for secret in secrets if secret in answer.text] == []
            await matrix.forget_names()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_key_to_a_public_file_is_the_instances_id_whoever_shows_it(matrix: Matrix, method: str) -> None:
    told = [
        wire(await matrix.ask((method, PUBLIC), matrix.mine.values, token))
        for token in (None, UNKNOWN_TOKEN, matrix.theirs.token, matrix.mine.token)
    ]
    assert told[0][0] == 200
    assert all(one == told[0] for one in told)
    nobodys = await matrix.ask((method, PUBLIC), absent(matrix.mine.values, "instance_id"), matrix.mine.token)
    assert nobodys.status_code == 404


@pytest.mark.parametrize("route", [("GET", "/v1/tokens"), ("DELETE", "/v1/tokens/{token_id}")], ids=named)
async def test_only_the_operator_looks_after_another_organizations_tokens(matrix: Matrix, route: Route) -> None:
    ours, theirs, nobodys = (
        {"organization_id": str(one)}
        for one in (matrix.mine.principal.organization_id, matrix.theirs.principal.organization_id, uuid4())
    )
    before = await matrix.state()
    refused = [
        await matrix.ask(route, matrix.theirs.values, matrix.mine.token, params=asked)
        for asked in (theirs, ours, nobodys)
    ]
    # Which organizations there are is the operator's to know.
    assert refused[0].status_code == 403
    assert wire(refused[0]) == wire(refused[1]) == wire(refused[2])
    operators = await matrix.narrow_token(matrix.mine, Scope.ADMIN)
    before = await matrix.state()
    for asked, status in ((nobodys, 404), ({"organization_id": "x"}, 400)):
        answer = await matrix.ask(route, matrix.theirs.values, operators, params=asked)
        assert answer.status_code == status, asked
    if route[0] == "DELETE":
        # A token of that organization, not of any.
        assert (await matrix.ask(route, matrix.theirs.values, operators, params=ours)).status_code == 404
    assert await matrix.state() == before
    answer = await matrix.ask(route, matrix.theirs.values, operators, params=theirs)
    assert answer.status_code == MATRIX[route].status
    listed = await matrix.ask(("GET", "/v1/tokens"), {}, None, on_socket=True, params=theirs)
    rows = {row["id"]: row for row in listed.json()}
    assert matrix.mine.values["token_id"] not in rows
    assert (rows[matrix.theirs.values["token_id"]]["revoked_at"] is not None) == (route[0] == "DELETE")
