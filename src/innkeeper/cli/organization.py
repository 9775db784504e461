"""`inn organization`: the tenants and their limits."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect, encode_segment
from innkeeper.cli.options import Json
from innkeeper.cli.printing import USAGE, fail, print_fields, print_json, print_table

app = typer.Typer(help="Organizations: the tenants and their limits. For the operator alone.", no_args_is_help=True)


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="1-63 characters of a-z, 0-9 and '-'.")],
    max_instances: Annotated[
        int | None, typer.Option(help="Rooms that it may have at one time.", show_default="no limit")
    ] = None,
    max_memory_mb: Annotated[
        int | None, typer.Option(help="MiB of memory that its rooms may have together.", show_default="no limit")
    ] = None,
    json: Json = False,
) -> None:
    """Make an organization with profiles of its own. Its first token: inn token create NAME --organization NAME."""
    body: dict[str, Any] = {"name": name, "max_instances": max_instances, "max_memory_mb": max_memory_mb}
    _show(connect(ctx).call("POST", "/v1/organizations", body), json=json)


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """List the organizations with their limits."""
    organizations: list[dict[str, Any]] = connect(ctx).get("/v1/organizations")
    if json:
        print_json(organizations)
        return
    fields = ("name", "max_instances", "max_memory_mb", "created_at", "id")
    rows = [[_plain(field, one[field]) for field in fields] for one in organizations]
    print_table(("NAME", "MAX INSTANCES", "MAX MEMORY MB", "CREATED", "ID"), rows, empty="no organizations")


@app.command()
def limit(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the organization.")],
    max_instances: Annotated[
        str | None, typer.Option(metavar="N", help="Rooms that it may have at one time; 'none' for no limit.")
    ] = None,
    max_memory_mb: Annotated[
        str | None, typer.Option(metavar="N", help="MiB that its rooms may have together; 'none' for no limit.")
    ] = None,
    json: Json = False,
) -> None:
    """Change an organization's limits; those that are not given stay. Rooms beyond a new limit live on."""
    given = {"max_instances": max_instances, "max_memory_mb": max_memory_mb}
    body = {field: _limit(field, text) for field, text in given.items() if text is not None}
    if not body:
        fail("nothing to change: give --max-instances or --max-memory-mb", status=USAGE)
    _show(connect(ctx).call("PATCH", f"/v1/organizations/{encode_segment(name)}", body), json=json)


def _limit(field: str, text: str) -> int | None:
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit()):
        fail(f"--{field.replace('_', '-')}: '{text}' is neither a number nor 'none'", status=USAGE)
    return int(text)


def _show(organization: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(organization)
    else:
        print_fields((field, _plain(field, value)) for field, value in organization.items())


def _plain(field: str, value: object) -> object:
    return "none" if value is None and field.startswith("max_") else value
