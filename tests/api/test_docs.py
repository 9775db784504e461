"""The pages describe every endpoint, parameter and field, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parents[2] / "docs" / "api"
# By the longest beginning of the path.
PAGES = {
    "/api/": "gentility.md",
    "/api/tokens": "gentity.md",
    "/vm/": "gentility.md",
    "/v1/": "v1.md",
    **{
        f"/v1/{handle}/pty/": "v1-terminals.md"
        for handle in ("vms/{vm_id}", "sessions/{session}", "rooms/{instance_id}")
    },
    "/v1/users/": "v1-account.md",
    "/v1/api-keys/": "v1-account.md",
    "/v1/ssh-keys": "v1-account.md",
    "/v1/ssh": "v1-account.md",
    "/v1/audit/": "v1-account.md",
    "/v1/vms": "v1-vms.md",
    "/v1/sessions/": "v1-vms.md",
    "/kill": "v1-vms.md",
    "/api/cli-auth/": "v1-account.md",
    "/cli-login/": "v1-account.md",
    "/v1/shares": "v1-shares.md",
    "/v1/sessions/app-url/": "v1-shares.md",
    "/v1/snapshots": "v1-snapshots.md",
    "/v1/vms/{vm_id}/snapshot": "v1-snapshots.md",
    "/v1/retention": "v1-retention.md",
    "/v1/vms/{vm_id}/logs": "v1-logs.md",
    "/v1/rooms/{instance_id}/logs": "v1-logs.md",
    "/v1/volumes": "v1-volumes.md",
    "/v1/vms/{vm_id}/volumes": "v1-volumes.md",
    "/v1/vms/{vm_id}/files": "v1-files.md",
    "/v1/volumes/{volume_id}/files": "v1-volume-files.md",
    "/upload": "v1-files.md",
    "/download": "v1-files.md",
    "/execute": "v1-executions.md",
    "/v1/executions/": "v1-executions.md",
    "/v1/vms/{vm_id}/exec": "v1-executions.md",
}
METHODS = ("get", "put", "post", "delete", "patch", "head")


def page(name: str) -> str:
    return (DOCS / name).read_text()


def page_of(path: str) -> str:
    return PAGES[max((beginning for beginning in PAGES if path.startswith(beginning)), key=len)]


def operations(api: Any) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method.upper(), path, operation)
        for path, item in api.document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


async def test_the_endpoints_are_the_documented_ones(api: Any) -> None:
    for name in set(PAGES.values()):
        headings = set(re.findall(r"^### `([A-Z]+ /[^`]*)`$", page(name), re.M))
        served = {f"{method} {path}" for method, path, _ in operations(api) if page_of(path) == name}
        assert headings == served


def fields(document: dict[str, Any], schema: Any, seen: set[str]) -> set[str]:
    """The property names of a schema and of all that it refers to."""
    found: set[str] = set()
    if isinstance(schema, dict):
        name = schema.get("$ref", "").rpartition("/")[2]
        if name and name not in seen:
            seen.add(name)
            found |= fields(document, document["components"]["schemas"][name], seen)
        properties = schema.get("properties", {})
        found |= set(properties)
        for value in (*properties.values(), *(v for k, v in schema.items() if k != "properties")):
            found |= fields(document, value, seen)
    elif isinstance(schema, list):
        for value in schema:
            found |= fields(document, value, seen)
    return found


async def test_every_field_and_parameter_is_documented(api: Any) -> None:
    count = 0
    for method, path, operation in operations(api):
        text = page(page_of(path))
        names = fields(api.document, [operation.get("requestBody"), operation["responses"]], set())
        names |= {parameter["name"] for parameter in operation["parameters"]} if "parameters" in operation else set()
        for name in names:
            assert re.search(rf"[`{{.\"]{name}[`}}\"]", text), (method, path, name)
            count += 1
    assert count > 150


async def test_every_error_code_is_documented(api: Any) -> None:
    from innkeeper.errors import BY_CODE

    text = "".join(map(page, set(PAGES.values())))
    inside = {"guest_error", "link_lost", "image_not_found"}
    # A VM begins with the disk then, and says so.
    inside |= {"memory_unusable", "checkpoint_damaged"}
    for code in set(BY_CODE) - inside:
        assert f"`{code}`" in text, code


async def test_no_body_takes_what_nobody_knows(api: Any) -> None:
    """A field that is misspelt, or of a newer client, is refused and not passed over."""
    schemas, looked_at = api.document["components"]["schemas"], 0
    for path, item in api.document["paths"].items():
        for method, operation in item.items():
            content = operation.get("requestBody", {}).get("content", {}) if isinstance(operation, dict) else {}
            reference = content.get("application/json", {}).get("schema", {}).get("$ref")
            # Who logs in has a client of any age.
            if reference is not None and not path.startswith("/api/cli-auth/"):
                looked_at += 1
                assert schemas[reference.rpartition("/")[2]].get("additionalProperties") is False, (method, path)
    assert looked_at > 25
