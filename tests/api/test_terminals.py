"""Terminals over a scripted host: what is said of those that do not start."""

from __future__ import annotations

from typing import Any

import pytest

from innkeeper.errors import InvalidRequestError

pytestmark = pytest.mark.anyio


async def test_a_shell_that_is_not_there_is_named_with_its_field(api: Any) -> None:
    vm = (await api.client.post("/v1/vms", json={})).json()["vm_id"]
    room = (await api.make_room())["instance_id"]
    api.world.host.terminals.start_error = InvalidRequestError("/nope: no such file or directory")
    answer = await api.client.post(f"/v1/vms/{vm}/pty/sessions", json={"shell": "/nope"})
    assert answer.status_code == 422
    problem = {"loc": ["body", "shell"], "msg": "/nope: no such file or directory", "type": "value_error"}
    assert answer.json() == {"detail": [problem]}
    answer = await api.client.post(f"/v1/rooms/{room}/pty/sessions", json={"shell": "/nope"})
    assert (answer.status_code, answer.json()["detail"]) == (400, "shell: /nope: no such file or directory")
