"""The OpenAPI document is true: schemathesis sends what it allows and what it does not, and checks every answer against it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from innkeeper.api.app import build_app
from innkeeper.control import organizations, tokens
from innkeeper.core.token import Scope

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripted_host import World

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

# Endpoints that refuse everyone but the operator, and an organization whose limits nothing else meets.
OPERATORS = ("/v1/organizations", "/v1/hosts", "/v1/log-level", "/v1/backup")
OTHER_ORGANIZATION = "other"


@contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop of its own: schemathesis calls from synchronous code."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class OnLoop:
    """The application, run on the loop that its control side lives on, whatever loop the caller has."""

    def __init__(self, app: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._loop = loop

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        mine = asyncio.get_running_loop()

        async def receive_here() -> Any:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(receive(), mine))

        async def send_here(message: Any) -> None:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(send(message), mine))

        call = self._app(scope, receive_here, send_here)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._loop))


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Any, World, UUID, str]]:
    with tempfile.TemporaryDirectory() as home, loop_in_a_thread() as loop:
        ready: list[Any] = []
        stop = asyncio.Event()

        async def life(started: threading.Event) -> None:
            world = World(Path(home))
            world.settings = world.settings.model_copy(update={"public_files_per_minute": 1_000_000})
            async with world.running() as control:
                world.control = control
                await organizations.create(control, world.operator, OTHER_ORGANIZATION)
                admin = await tokens.create(control, world.operator, "admin", scopes=frozenset({Scope.ADMIN}))
                ready.extend((OnLoop(build_app(control), loop), world, world.profile_id("base"), admin.text))
                started.set()
                await stop.wait()

        started = threading.Event()
        running = asyncio.run_coroutine_threadsafe(life(started), loop)
        assert started.wait(20)
        try:
            yield ready[0], ready[1], ready[2], ready[3]
        finally:
            loop.call_soon_threadsafe(stop.set)
            running.result(20)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_document_is_true(
    served: tuple[Any, World, UUID, str], mode: GenerationMode, subtests: pytest.Subtests
) -> None:
    app, world, profile_id, admin = served
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    seen = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        with subtests.test(operation=operation.label):
            token = admin if operation.path.startswith(OPERATORS) else world.first_token
            check_operation(operation, token, profile_id, mode)
        seen += 1
    assert seen >= 25


def check_operation(operation: Any, token: str, profile_id: UUID, mode: GenerationMode) -> None:
    headers = {"Authorization": f"Bearer {token}"}

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        if "profile_id" in case.path_parameters and operation.method != "delete":
            # A profile that exists, so that more than its absence is tested.
            case.path_parameters["profile_id"] = str(profile_id)
        if "name" in case.path_parameters:
            case.path_parameters["name"] = OTHER_ORGANIZATION
        answer = case.call_and_validate(headers=headers, checks=CHECKS)
        # 503 is a documented answer: for a host that does not exist, for example.
        assert answer.status_code != 500

    # Some operations have nothing that could be wrong.
    with contextlib.suppress(Unsatisfiable):
        check()
