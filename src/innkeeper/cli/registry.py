"""`inn registry`: credentials for the registries that images are imported from."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect, encode_segment
from innkeeper.cli.options import Json
from innkeeper.cli.printing import USAGE, fail, print_json, print_table

app = typer.Typer(help="Credentials for registries that images are imported from.", no_args_is_help=True)
Registry = Annotated[
    str, typer.Argument(metavar="REGISTRY", help="Host of the registry, with its port where it has one.")
]


@app.command()
def login(
    ctx: typer.Context,
    registry: Registry,
    username: Annotated[str, typer.Option(help="Who the organization is there.")],
) -> None:
    """Keep a credential; the password, or an access token, is read from standard input and never shown again."""
    asked = sys.stdin.isatty()
    password: str = typer.prompt("Password", hide_input=True) if asked else sys.stdin.read().rstrip("\r\n")
    if not password:
        fail("there is no password on standard input", status=USAGE)
    connect(ctx).call("PUT", f"/v1/registries/{encode_segment(registry)}", {"username": username, "password": password})


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """List the registries that there is a credential for."""
    found: list[dict[str, Any]] = connect(ctx).get("/v1/registries")
    if json:
        print_json(found)
        return
    rows = [(one["registry"], one["username"], one["updated_at"][:19]) for one in found]
    print_table(("REGISTRY", "USERNAME", "UPDATED"), rows, empty="no registries")


@app.command()
def logout(ctx: typer.Context, registry: Registry) -> None:
    """Forget the credential for a registry."""
    connect(ctx).call("DELETE", f"/v1/registries/{encode_segment(registry)}")
