"""VMs and sessions over HTTP: fields, shapes, what is refused, and what becomes of them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from innkeeper.control import (
    executions,
    expiry,
    organizations,
    ports,
    provisioning,
    sessions,
    terminals,
    trees,
    vm_executions,
    vms,
)
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.host_verbs import EnsureMachine, Execute
from innkeeper.core.terminal_verbs import StartTerminal
from innkeeper.core.vm import parse_vm_id, vm_id
from innkeeper.errors import UnavailableError

pytestmark = pytest.mark.anyio


async def make(api: Any, **fields: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/vms", json=fields)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def record(api: Any, name: str) -> dict[str, Any]:
    answer = await api.client.get(f"/v1/vms/{name}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ensured(api: Any) -> list[EnsureMachine]:
    return [request for request in api.world.host.asked if isinstance(request, EnsureMachine)]


def test_ids_are_reversible_and_have_one_spelling() -> None:
    one = uuid4()
    for generation in (1, 2, 999_999):
        text = vm_id(one, generation)
        assert parse_vm_id(text) == (one, generation)
        assert parse_vm_id(text.upper()) is None
    for wrong in ("", "vm_", str(one), vm_id(one, 1) + "-1", vm_id(one, 1) + "-0", "vm_" + "7" * 26):
        assert parse_vm_id(wrong) is None


async def test_a_vm_is_what_was_asked_for(api: Any) -> None:
    made = await make(
        api, memory_mb=512, vcpu_count=1, metadata={"a": [1]}, env={"KEY": "v4lue"}, vm_lifetime_seconds=60
    )
    assert made.keys() == {"vm_id", "session_id", "status", "share", "custom_domain", "env_status", "env_error"}
    assert (made["status"], made["env_status"], made["share"], made["env_error"]) == ("active", "applied", None, None)
    (asked,) = ensured(api)
    assert (asked.shape.memory_mb, asked.shape.vcpu_count, asked.env["KEY"], asked.user) == (512, 1, "v4lue", "root")
    found = await record(api, made["vm_id"])
    assert (found["memory_mb"], found["vcpu_count"], found["metadata"]) == (512, 1, {"a": [1]})
    assert (found["status"], found["session_id"], found["ended_at"]) == ("active", made["session_id"], None)
    created, expires = (datetime.fromisoformat(found[name]) for name in ("created_at", "expires_at"))
    assert expires - created == timedelta(seconds=60)
    assert found["boot_trace"] and found["isolation"]["level"]
    assert "v4lue" not in str(found)
    stored = await api.world.control.database.read(lambda c: c.exec_driver_sql("select * from vms").all())
    assert b"v4lue" not in repr(stored).encode()


async def test_the_defaults(api: Any) -> None:
    found = await record(api, (await make(api))["vm_id"])
    assert (found["memory_mb"], found["vcpu_count"], found["vm_lifetime_seconds"]) == (1024, 2, 300)
    assert (found["image"], found["metadata"], found["env_status"]) == ("python-data-science", {}, "none")
    named = await record(api, (await make(api, image_variant="base"))["vm_id"])
    assert (named["image"], named["image_variant"]) == ("base", "base")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory_mb", 1), ("memory_mb", "much"), ("vcpu_count", 0), ("vm_lifetime_seconds", 19), ("idle_seconds", 1),
        ("metadata", []), ("metadata", {"a": "x" * 20_000}), ("env", {"A": 1}), ("env", {"A B": "x"}),
        ("image_variant", "computer-use"), ("image_variant", "nix-dev"), ("image_variant", "nosuch"),
        ("snapshot_id", "s"), ("snapshot_on_terminate", "maybe"), ("snapshot_name", "n\x1b"), ("volumes", [{"volume_id": "v"}]),
        ("custom_domain", {"domain": "d.example"}), ("vault_ids", ["v"]), ("auto_suspend", "maybe"), ("auto_resume", 7),
        ("driver", "firecracker"), ("min_isolation", "strong"), ("driver", 1),
        ("surely_unknown", 1), ("egress_policy", {"allowed_domains": ["a.example"]}), ("egress_policy", {"allow_public_repos": True}),
        ("egress_policy", {"allow_http": "yes"}), ("egress_policy", {"allowed_cidrs": ["1.2.3.4/8"]}),
        ("egress_policy", {"allowed_cidrs": ["::/0"]}), ("egress_policy", {"allowed_cidrs": [1]}), ("egress_policy", {"else": 1}),
    ],
)  # fmt: skip
async def test_what_is_refused_names_its_field(api: Any, field: str, value: Any) -> None:
    answer = await api.client.post("/v1/vms", json={field: value})
    assert answer.status_code == 422, answer.text
    (problem, *_) = answer.json()["detail"]
    assert problem.keys() == {"loc", "msg", "type"}
    assert problem["loc"][:2] == ["body", field]
    assert problem["msg"]
    assert ensured(api) == []
    assert (await api.client.get("/v1/vms/")).json() == []


async def test_harmless_values_of_what_is_not_in_force(api: Any) -> None:
    await make(
        api,
        snapshot_id=None,
        snapshot_on_terminate=False,
        volumes=[],
        vault_ids=[],
        auto_suspend=False,
        custom_domain=None,
    )


async def test_too_long_a_life_says_what_is_possible(api: Any) -> None:
    answer = await api.client.post("/v1/vms", json={"vm_lifetime_seconds": 90_000})
    assert (answer.status_code, answer.json()["detail"]) == (403, "VM lifetime cannot exceed 86400s")


async def test_an_isolation_that_cannot_be_had_is_refused_with_what_is_offered(api: Any) -> None:
    offered = "offered: gvisor (gvisor, on systrap)"
    for fields, text in (
        ({"driver": "qemu"}, f"driver: no host offers 'qemu' now; {offered}"),
        ({"min_isolation": "microvm"}, f"min_isolation: no host offers 'microvm' now; {offered}"),
    ):
        for query in ({}, {"wait": "false"}):
            answer = await api.client.post("/v1/vms", json=fields, params=query)
            assert (answer.status_code, answer.json()) == (503, {"detail": text, "code": "service_unavailable"})
            assert answer.headers["retry-after"] == "30"
    never = await api.client.post("/v1/vms", json={"driver": "gvisor", "min_isolation": "microvm"})
    problem = {
        "loc": ["body", "min_isolation"],
        "msg": "'microvm' is more than the driver 'gvisor' gives, which is 'gvisor'",
        "type": "value_error",
    }
    assert (never.status_code, never.json()) == (422, {"detail": [problem]})
    assert ensured(api) == [] and (await api.client.get("/v1/vms/")).json() == []
    found = await record(api, (await make(api, driver="gvisor", min_isolation="none"))["vm_id"])
    assert (found["driver"], found["min_isolation"]) == ("gvisor", "none")
    assert found["isolation"] == {
        "level": "gvisor", "driver": "gvisor", "platform": "systrap", "accelerator": None, "reason": "measured",
    }  # fmt: skip


async def test_a_session_has_one_living_vm(api: Any) -> None:
    made = await make(api, metadata={"n": 1})
    again = await make(api, session_id=made["session_id"])
    assert again["vm_id"] == made["vm_id"]
    assert len(ensured(api)) == 1
    other_shape = await api.client.post("/v1/vms", json={"session_id": made["session_id"], "memory_mb": 4096})
    assert other_shape.status_code == 409
    gone = await api.client.delete(f"/v1/vms/{made['vm_id']}")
    assert (gone.status_code, gone.json()["status"], gone.json()["end_reason"]) == (200, "killed", "deleted")
    assert (await api.client.delete(f"/v1/vms/{made['vm_id']}")).json()["end_reason"] == "deleted"
    next_one = await make(api, session_id=made["session_id"])
    assert next_one["vm_id"] != made["vm_id"] and next_one["session_id"] == made["session_id"]
    assert (await record(api, next_one["vm_id"]))["metadata"] == {"n": 1}
    unknown = await api.client.post("/v1/vms", json={"session_id": str(uuid4())})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "session_not_found")


async def test_many_at_once_for_one_session_get_one_vm(api: Any) -> None:
    session = (await api.client.post("/v1/sessions/session", json={})).json()["session_id"]
    answers = await asyncio.gather(*(make(api, session_id=session) for _ in range(5)))
    assert len({answer["vm_id"] for answer in answers}) == 1
    assert len(ensured(api)) == 1


async def test_an_address_may_begin_with_two_slashes(api: Any) -> None:
    made = await make(api)
    answer = await api.client.get("http://inn//v1/vms")
    assert [vm["vm_id"] for vm in answer.json()] == [made["vm_id"]]


async def test_an_egress_policy_is_the_hosts_to_keep(api: Any) -> None:
    policy = {
        "allow_http": False,
        "allowed_cidrs": ["192.0.2.0/24"],
        "allow_public_repos": False,
        "allowed_domains": [],
    }
    made = await make(api, egress_policy=policy)
    shape = ensured(api)[-1].shape
    assert (shape.egress_mode, shape.egress_ports, shape.egress_cidrs) == ("limited", (443,), ("192.0.2.0/24",))
    shown = (await record(api, made["vm_id"]))["egress_policy"]
    assert shown == {**policy, "allow_https": True, "allow_package_managers": False}
    # The session's next one has it too, and no warm guest of another policy is taken for it.
    await api.client.delete(f"/v1/vms/{made['vm_id']}")
    again = await make(api, session_id=made["session_id"])
    assert (await record(api, again["vm_id"]))["egress_policy"] == shown
    await make(api)
    assert (ensured(api)[-1].shape.egress_mode, ensured(api)[-1].shape.egress_ports) == ("internet", ())
    assert len({request.shape.pool_key for request in ensured(api)}) == 2
    other = await api.client.post("/v1/vms", json={"session_id": made["session_id"], "egress_policy": {}})
    assert other.status_code == 409


async def test_the_two_lists(api: Any) -> None:
    one, two = await make(api), await make(api)
    await api.client.delete(f"/v1/vms/{one['vm_id']}")
    living, everything = [(await api.client.get(path)).json() for path in ("/v1/vms", "/v1/vms/")]
    assert [vm["vm_id"] for vm in living] == [two["vm_id"]]
    assert [(vm["vm_id"], vm["status"]) for vm in everything] == [(two["vm_id"], "active"), (one["vm_id"], "killed")]


async def test_without_waiting_it_is_creating(api: Any) -> None:
    api.world.host.hold.clear()
    answer = await api.client.post("/v1/vms?wait=false", json={"env": {"A": "b"}})
    made = answer.json()
    assert (answer.status_code, made["status"], made["env_status"]) == (200, "creating", "none")
    assert (await record(api, made["vm_id"]))["status"] == "creating"
    api.world.host.hold.set()
    entry = api.world.control.live.by_instance(parse_vm_id(made["vm_id"])[0])
    await api.world.until(lambda: entry.ready)
    assert (await record(api, made["vm_id"]))["env_status"] == "applied"


async def test_waiting_too_long_is_504_and_it_goes_on(api: Any) -> None:
    control = api.world.control
    control.settings = control.settings.model_copy(update={"room_wait_seconds": 0.2})
    api.world.host.hold.clear()
    answer = await api.client.post("/v1/vms", json={})
    assert (answer.status_code, answer.json()["code"]) == (504, "provisioning_timeout")
    (listed,) = (await api.client.get("/v1/vms")).json()
    assert listed["status"] == "creating"
    api.world.host.hold.set()
    await api.world.until(lambda: all(entry.ready for entry in control.live))


async def test_what_cannot_be_made_leaves_nothing(api: Any) -> None:
    api.world.host.ensure_error = UnavailableError("full")
    answer = await api.client.post("/v1/vms", json={})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert (await api.client.get("/v1/vms/")).json() == []
    api.world.host.ensure_error = None
    await make(api)


async def test_what_somebody_was_told_of_is_not_forgotten(api: Any) -> None:
    """One waits for the VM, another has its id already when it turns out that there is no room for it."""
    ended = await make(api)
    session_id = ended["session_id"]
    assert (await api.client.delete(f"/v1/vms/{ended['vm_id']}")).is_success
    api.world.host.asked.clear()
    api.world.host.hold.clear()
    waiting = asyncio.ensure_future(api.client.post("/v1/vms", json={"session_id": session_id}))
    await api.world.until(lambda: ensured(api))
    told = (await api.client.post("/v1/vms?wait=false", json={"session_id": session_id})).json()
    assert told["status"] == "creating"
    api.world.host.ensure_error = UnavailableError("full")
    api.world.host.hold.set()
    assert (await waiting).status_code == 503
    assert (await record(api, told["vm_id"]))["status"] == "error"


async def test_a_change_that_could_not_be_stored_is_none(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await make(api, metadata={"a": "b"})
    path = f"/v1/vms/{made['vm_id']}"
    before = await record(api, made["vm_id"])

    async def full(*_: Any, **__: Any) -> Any:
        raise UnavailableError("full")

    with monkeypatch.context() as patch:
        patch.setattr(api.world.control.database, "write", full)
        assert (await api.client.patch(path, json={"metadata": {"c": "d"}})).status_code == 503
        assert (await api.client.post(f"{path}/hold", json={"seconds": 60, "reason": "r"})).status_code == 503
    after = await record(api, made["vm_id"])
    assert [after[name] for name in ("metadata", "hold_until", "expires_at")] == [
        before[name] for name in ("metadata", "hold_until", "expires_at")
    ]


@pytest.mark.parametrize("wait", ["true", "false"])
async def test_of_two_that_ask_at_once_the_second_gets_what_it_asked_for_or_an_error(api: Any, wait: str) -> None:
    session = (await api.client.post("/v1/sessions/session", json={})).json()["session_id"]

    async def create(**body: Any) -> Any:
        return await api.client.post("/v1/vms", params={"wait": wait}, json={"session_id": session, **body})

    shapes = ({"memory_mb": 512}, {"memory_mb": 2048}, {"share": {"port": 80}}, {"metadata": {"a": 1}})
    answers = await asyncio.gather(*(create(**shape) for shape in shapes))
    small, large, shared, told = answers
    [vm] = {answer.json()["vm_id"] for answer in answers if answer.status_code == 200}
    assert api.world.host.count(EnsureMachine) == 1
    # Whoever of them was first decided.
    found = await record(api, vm)
    for answer, memory_mb in ((small, 512), (large, 2048)):
        assert answer.status_code == (200 if found["memory_mb"] == memory_mb else 409), (found, answer.text)
        assert answer.status_code == 200 or "memory_mb" in answer.json()["detail"]
    assert [shared.status_code, told.status_code, found["metadata"]] == [200, 200, {"a": 1}]
    assert [one["share_id"] for one in (await api.client.get("/v1/shares")).json()] == [
        shared.json()["share"]["share_id"]
    ]


async def test_changes(api: Any) -> None:
    made = await make(api, env={"A": "b"})
    path = f"/v1/vms/{made['vm_id']}"
    changed = (await api.client.patch(path, json={"memory_mb": 2048, "metadata": {"x": 1}, "idle_seconds": 600})).json()
    assert (changed["memory_mb"], changed["next_memory_mb"], changed["metadata"]) == (1024, 2048, {"x": 1})
    assert changed["idle_seconds"] == 600
    assert (await api.client.patch(path, json={"idle_seconds": None})).json()["idle_seconds"] is None
    for wrong in ({"memory_mb": 1}, {"auto_suspend": 7}, {"vcpu_count": 3}):
        assert (await api.client.patch(path, json=wrong)).status_code == 422
    # The machine is gone: the next use starts it with what was asked for since.
    instance_id = parse_vm_id(made["vm_id"])[0]
    api.world.host.machines.clear()
    provisioning.mark_lost(api.world.control, api.world.control.live.by_instance(instance_id))
    assert (await record(api, made["vm_id"]))["status"] == "suspended"
    await make(api, session_id=made["session_id"])
    assert ensured(api)[-1].shape.memory_mb == 2048
    assert (await record(api, made["vm_id"]))["memory_mb"] == 2048


async def test_no_change_ends_a_vm_before_its_lease(api: Any) -> None:
    made = await make(api, vm_lifetime_seconds=100)
    path = f"/v1/vms/{made['vm_id']}"

    async def left() -> float:
        ends_at = datetime.fromisoformat((await record(api, made["vm_id"]))["expires_at"])
        return (ends_at - datetime.now(UTC)).total_seconds()

    assert (await api.client.post(f"{path}/hold", json={"seconds": 2_000})).is_success
    assert (await api.client.patch(path, json={"vm_lifetime_seconds": 60})).is_success
    assert await left() > 1_500
    # Nor does who only asks for the session's VM again.
    await make(api, session_id=made["session_id"], vm_lifetime_seconds=60)
    assert await left() > 1_500
    assert (await api.client.post(f"{path}/hold", json={"seconds": 0})).is_success
    assert (await api.client.patch(path, json={"vm_lifetime_seconds": 60})).is_success
    assert await left() < 1_500


async def test_more_memory_is_the_organizations_to_give(api: Any) -> None:
    control = api.world.control
    first, second = await make(api, memory_mb=1024), await make(api, memory_mb=1024)
    await organizations.set_limits(control, api.world.operator, "default", {"max_memory_mb": 4096, "max_instances": 2})
    path = f"/v1/vms/{first['vm_id']}"

    async def patch(where: str, memory_mb: int) -> int:
        answer = await api.client.patch(where, json={"memory_mb": memory_mb, "metadata": {"asked": memory_mb}})
        if answer.status_code == 429:
            assert answer.json()["code"] == "rate_limited" and "4096 MiB" in answer.json()["detail"]
            assert int(answer.headers["retry-after"]) >= 1
        return int(answer.status_code)

    assert await patch(path, 3073) == 429
    found = await record(api, first["vm_id"])
    assert (found["next_memory_mb"], found["metadata"]) == (1024, {})
    assert await patch(path, 3072) == 200
    # What the first one's next start gets is not there for the second one.
    other = f"/v1/vms/{second['vm_id']}"
    assert await patch(other, 1025) == 429
    assert await patch(other, 512) == 200
    # It has its 1024 until it is started again.
    assert await patch(other, 1024) == 200
    assert await patch(path, 1024) == 200
    assert await patch(other, 3072) == 200
    await organizations.set_limits(control, api.world.operator, "default", {"max_memory_mb": 1024})
    # Less is possible however much there is too much.
    assert await patch(other, 2048) == 200
    found = await record(api, second["vm_id"])
    assert (found["memory_mb"], found["next_memory_mb"]) == (1024, 2048)


async def test_staged_variables_reach_what_begins_next_and_are_not_stored(api: Any) -> None:
    made = await make(api)
    path = f"/v1/vms/{made['vm_id']}/stage-env"
    answer = await api.client.post(path, json={"entries": [{"env_name": "TOKEN", "value": "s3cret"}]})
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "staged": ["TOKEN"]})
    for name, value in (("A B", "x"), ("NUL", "\0"), ("LONG", "x" * 40_000)):
        refused = await api.client.post(path, json={"entries": [{"env_name": name, "value": value}]})
        assert (refused.status_code, refused.json()["detail"][0]["loc"][:2]) == (422, ["body", "entries"]), refused.text
    assert (await api.client.post(path, json={"entries": [{"env_name": "OWN", "value": "staged"}]})).status_code == 200
    vm = f"/v1/vms/{made['vm_id']}"
    for where, body in (
        (f"{vm}/exec", {"command": "true", "env": {"OWN": "2"}}),
        (f"{vm}/exec", {"argv": ["true"], "background": True}),
        ("/execute", {"vm_id": made["vm_id"], "code": "1"}),
        ("/execute_async", {"session_id": made["session_id"], "code": "1"}),
        ("/execute", {"vm_id": made["vm_id"], "code": "true", "language": "bash"}),
        ("/execute", {"vm_id": made["vm_id"], "code": "1", "language": "node"}),
        (f"{vm}/pty/sessions", {}),
        (f"/v1/sessions/{made['session_id']}/pty/sessions", {"command": "true"}),
    ):
        assert (await api.client.post(where, json=body)).is_success, where
    begun = [request.env for request in api.world.host.asked if isinstance(request, (Execute, StartTerminal))]
    assert begun == [{"TOKEN": "s3cret", "OWN": "2"}, *[{"TOKEN": "s3cret", "OWN": "staged"}] * 7]
    assert "s3cret" not in repr(api.world.host.asked)
    await api.world.control.later.flush(api.world.control)
    for table in ("vms", "sessions", "vm_events", "audit_events"):
        rows = await api.world.control.database.read(lambda c, t=table: c.exec_driver_sql(f"select * from {t}").all())
        assert "s3cret" not in repr(rows)


def move(api: Any, name: str, **fields: Any) -> Any:
    """The VM, with other times than it has."""
    entry = api.world.control.live.by_instance(parse_vm_id(name)[0])
    entry.change_vm(dataclasses.replace(entry.vm, **fields))
    return entry


async def events(api: Any, name: str) -> list[tuple[str, str]]:
    answer = await api.client.get(f"/v1/vms/{name}/events")
    assert answer.status_code == 200, answer.text
    return [(event["type"], event["reason"]) for event in answer.json()]


async def test_an_end_is_announced_and_its_reason_kept(api: Any) -> None:
    name = (await make(api, vm_lifetime_seconds=600))["vm_id"]
    expiry.announce(api.world.control)
    assert ("expiring", "lifetime") not in await events(api, name)
    move(api, name, expires_at=datetime.now(UTC) + timedelta(seconds=30))
    expiry.announce(api.world.control)
    expiry.announce(api.world.control)
    assert (await events(api, name)).count(("expiring", "lifetime")) == 1
    held = await api.client.post(f"/v1/vms/{name}/hold", json={"seconds": 500, "reason": "a build runs"})
    assert held.json()["hold_reason"] == "a build runs"
    assert datetime.fromisoformat(held.json()["expires_at"]) > datetime.now(UTC) + timedelta(seconds=400)
    entry = move(api, name, expires_at=datetime.now(UTC))
    entry.open_streams = 1
    api.world.control.expiry_hint.set()
    await api.world.until(lambda: entry.doomed and api.world.control.live.by_instance(entry.instance.id) is None)
    found = await record(api, name)
    assert (found["status"], found["end_reason"]) == ("killed", "expired")
    told = await events(api, name)
    assert [told[0], told[1], told[-1]] == [("created", ""), ("ready", "started"), ("ending", "expired")]
    assert ("held", "a build runs") in told


def frames(text: str) -> list[tuple[str | None, str, Any]]:
    """(id, event, data) of server-sent events; comments are none."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields.get("id"), fields["event"], json.loads(fields["data"])))
    return found


async def test_events_are_told_as_they_happen_until_the_vm_is_no_more(api: Any) -> None:
    name = (await make(api))["vm_id"]
    path = f"/v1/vms/{name}/events"
    entry = api.world.control.live.by_instance(parse_vm_id(name)[0])
    before = (await api.client.get(path)).json()
    async with asyncio.TaskGroup() as group:
        whole = group.create_task(api.client.get(f"{path}/stream"))
        rest = group.create_task(api.client.get(f"{path}/stream", headers={"Last-Event-ID": before[-1]["id"]}))
        await api.world.until(lambda: len(entry.followers) == 2)
        await api.client.post(f"/v1/vms/{name}/hold", json={"seconds": 100, "reason": "later"})
        await api.client.delete(f"/v1/vms/{name}")
    assert entry.followers == set()
    listed = (await api.client.get(path)).json()
    assert [event["type"] for event in listed] == ["created", "ready", "held", "ending"]
    last = (None, "end", {"vm_id": name, "end_reason": "deleted"})
    expected = [(event["id"], event["type"], event) for event in listed]
    assert whole.result().headers["content-type"].startswith("text/event-stream")
    assert frames(whole.result().text) == [*expected, last]
    assert frames(rest.result().text) == [*expected[len(before) :], last]
    # One who comes too late hears it too.
    late = await api.client.get(f"{path}/stream?after={listed[-2]['id']}")
    assert frames(late.text) == [expected[-1], last]
    for wrong in ({"headers": {"Last-Event-ID": "7"}}, {"params": {"after": "x"}}):
        assert (await api.client.get(f"{path}/stream", **wrong)).status_code in (400, 422)
    assert (await api.client.get("/v1/vms/vm_x/events/stream")).status_code == 404


@asynccontextmanager
async def following(api: Any, entry: VmEntry) -> AsyncIterator[None]:
    request = executions.ExecutionRequest("x", merge=False)
    row = await vm_executions.begin(api.world.control, api.world.me, entry, "exec", request)
    async with aclosing(vm_executions.follow(api.world.control, row, entry, offset=0)) as output:
        await anext(output)
        yield


@asynccontextmanager
async def connected(api: Any, entry: VmEntry) -> AsyncIterator[None]:
    async def stay(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(stay, "127.0.0.1", 0)
    async with server:
        api.world.host.ports.servers[80] = server.sockets[0].getsockname()[1]
        async with ports.connect(api.world.control, api.world.me, entry, 80):
            yield


WORK: dict[str, Callable[[Any, VmEntry], AbstractAsyncContextManager[Any]]] = {
    "execution": lambda api, entry: executions.start(
        api.world.control, api.world.me, entry, executions.ExecutionRequest("x")
    ),
    "stream of an execution": following,
    "terminal": lambda api, entry: terminals.attach(api.world.control, api.world.me, entry, "t"),
    "watch": lambda api, entry: trees.watch(api.world.control, api.world.me, entry, b"/tmp", recursive=False),
    "connection": connected,
}


@pytest.mark.parametrize("work", WORK)
async def test_what_goes_on_for_somebody_keeps_a_vm(api: Any, work: str) -> None:
    name = (await make(api, idle_seconds=60, vm_lifetime_seconds=3_600))["vm_id"]
    control, instance_id = api.world.control, parse_vm_id(name)[0]
    entry = control.live.by_instance(instance_id)
    api.world.host.terminals.add(instance_id, "t")

    def pass_time() -> None:
        # As if it had been announced, and the moment were over.
        api.world.host.machines[instance_id]["idle_seconds"] = 1_000.0
        entry.announced_idle = time.time() - 1
        entry.last_active -= 1_000

    async with WORK[work](api, entry):
        assert entry.open_streams == 1
        pass_time()
        assert await expiry.expire(control) == []
        assert not entry.doomed
    assert entry.open_streams == 0
    # It was used until now.
    assert await expiry.expire(control) == []
    pass_time()
    await expiry.expire(control)
    await api.world.until(lambda: control.live.by_instance(instance_id) is None)
    found = await record(api, name)
    assert (found["end_reason"], (await events(api, name))[-1]) == ("idle", ("ending", "idle"))


async def test_idleness_knows_of_work_and_leases(api: Any) -> None:
    name = (await make(api, idle_seconds=60, vm_lifetime_seconds=3_600))["vm_id"]
    control = api.world.control
    entry = control.live.by_instance(parse_vm_id(name)[0])
    api.world.host.machines[entry.instance.id]["idle_seconds"] = 1_000.0
    entry.last_active -= 1_000
    entry.open_streams = 1
    assert await expiry.expire(control) == []
    entry.open_streams = 0
    await api.client.post(f"/v1/vms/{name}/hold", json={"seconds": 100})
    assert await expiry.expire(control) == []
    api.world.host.machines[entry.instance.id]["user_processes"] = 1
    await api.client.post(f"/v1/vms/{name}/hold", json={"seconds": 0})
    assert await expiry.expire(control) == []
    assert ("expiring", "idle") not in await events(api, name)
    api.world.host.machines[entry.instance.id]["user_processes"] = 0
    # Announced first, also by one who looks late; the server's own look may be the first.
    assert await expiry.expire(control) == []
    await expiry.expire(control)
    told = await events(api, name)
    assert told.count(("expiring", "idle")) == 1 and ("ending", "idle") not in told
    assert entry.announced_idle is not None and entry.announced_idle > time.time() + 20
    # Whoever uses it keeps it, and the next end is announced again.
    assert (await api.client.post(f"/v1/vms/{name}/exec", json={"command": "true"})).status_code == 200
    assert await expiry.expire(control) == []
    entry.last_active -= 1_000
    entry.announced_idle -= 2_000
    await expiry.expire(control)
    assert (await events(api, name)).count(("expiring", "idle")) == 2
    entry.announced_idle = time.time()
    await expiry.expire(control)
    await api.world.until(lambda: control.live.by_instance(entry.instance.id) is None)
    assert (await record(api, name))["end_reason"] == "idle"


async def test_the_server_forgets_nothing_over_a_restart(api: Any) -> None:
    made = await make(api, metadata={"kept": True}, env={"A": "b"}, idle_seconds=99)
    ended = await make(api)
    await api.client.delete(f"/v1/vms/{ended['vm_id']}")
    before = await record(api, made["vm_id"])
    await api.world.control.close()
    async with api.world.running() as control:
        view = await vms.find(control, api.world.me, made["vm_id"])
        assert (view.vm.metadata, view.vm.idle_seconds, view.vm.expires_at.isoformat()) == (
            {"kept": True}, 99, datetime.fromisoformat(before["expires_at"]).isoformat(),
        )  # fmt: skip
        entry = await sessions.ready_entry(control, api.world.me, view.vm.session_id)
        assert entry.instance.id == view.instance.id
        assert (await vms.find(control, api.world.me, ended["vm_id"])).vm.end_reason == "deleted"


async def test_a_session_gets_its_vm_on_first_use(api: Any) -> None:
    async with api.anonymous() as client:
        answer = await client.post("/v1/sessions/session", json={"api_key": api.token, "memory_mb": 512})
        assert answer.status_code == 200, answer.text
        for body in ({"api_key": "nonsense"}, {}, {"api_key": 7}):
            refused = await client.post("/v1/sessions/session", json=body)
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    session = answer.json()["session_id"]
    status = (await api.client.get(f"/v1/sessions/status/{session}")).json()
    assert (status["exists"], status["vm_assigned"], status["vm_alive"], status["vm_status"]) == (
        True,
        False,
        False,
        None,
    )
    assert ensured(api) == []
    entry = await sessions.ready_entry(api.world.control, api.world.me, UUID(session))
    assert entry.instance.memory_mb == 512
    status = (await api.client.get(f"/v1/sessions/status/{session}")).json()
    assert (status["vm_alive"], status["vm_status"], status["vm_id"]) == (True, "active", entry.vm.vm_id)
    assert 0 < status["expires_in_seconds"] <= 300
    usage = (await api.client.get(f"/v1/sessions/usage/{session}")).json()
    assert (usage["memory_mb"], usage["vcpu_count"]) == (512, 2)
    killed = await api.client.post("/kill", json={"session_id": session})
    assert (killed.status_code, killed.json()["status"]) == (200, "killed")
    assert (await api.client.post("/kill", json={"session_id": session})).status_code == 404
    status = (await api.client.get(f"/v1/sessions/status/{session}")).json()
    assert (status["vm_alive"], status["vm_status"], status["expires_in_seconds"]) == (False, "killed", 0.0)
    assert (await sessions.ready_entry(api.world.control, api.world.me, UUID(session))).vm.vm_id != entry.vm.vm_id


async def test_a_session_with_variables_gets_its_vm_at_once(api: Any) -> None:
    answer = await api.client.post("/v1/sessions/session", json={"env": {"A": "b"}})
    assert answer.json()["vm_id"] is not None
    await api.world.until(lambda: len(ensured(api)) == 1)
    assert ensured(api)[0].env["A"] == "b"


async def test_sandboxes_by_metadata(api: Any) -> None:
    one = await make(api, metadata={"team": "a", "n": 1})
    await make(api, metadata={"team": "b"})
    found = await api.client.get("/v1/sessions/sandboxes", params={"metadata": '{"team": "a"}'})
    assert [vm["vm_id"] for vm in found.json()] == [one["vm_id"]]
    assert len((await api.client.get("/v1/sessions/sandboxes", params={"limit": 1})).json()) == 1
    for wrong in ("[]", "{", "x"):
        assert (await api.client.get("/v1/sessions/sandboxes", params={"metadata": wrong})).status_code == 422


async def test_a_full_organization_is_told_so(api: Any) -> None:
    await organizations.set_limits(api.world.control, api.world.operator, "default", {"max_instances": 1})
    await make(api)
    answer = await api.client.post("/v1/vms", json={})
    assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
    assert int(answer.headers["retry-after"]) >= 1
