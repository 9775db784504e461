"""`inn token`: bearers of scopes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import fail, note, print_json, print_table, say

Organization = Annotated[
    str | None,
    typer.Option("--organization", help="Organization, by name; only the operator may.", show_default="your own"),
]
app = typer.Typer(help="Tokens: who may use the API, and for what.", no_args_is_help=True)


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the token is for.")],
    dialect: Annotated[
        str, typer.Option(help="Whose form it has: gentility, instavm, gentity or starpod.")
    ] = "gentility",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What it may do, repeatable: rooms, profiles, tokens, audit, admin.", show_default="all but admin"
        ),
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="Gentility's form only: rk_test_ in place of rk_live_.")] = False,
    organization: Organization = None,
    json: Json = False,
) -> None:
    """Make a token and print it: it is shown this once. Standard output holds nothing but the token."""
    body: dict[str, Any] = {"name": name, "dialect": dialect, "test": test}
    if scope:
        body["scopes"] = scope
    if organization is not None:
        body["organization"] = organization
    token = connect(ctx).call("POST", "/v1/tokens", body)
    if json:
        print_json(token)
        return
    say(token["token"])
    note(f"token '{token['name']}' for {', '.join(token['scopes'])}: keep it now, it is not shown again")


@app.command("list")
def list_(ctx: typer.Context, organization: Organization = None, json: Json = False) -> None:
    """List the tokens, without their texts."""
    server = connect(ctx)
    tokens: list[dict[str, Any]] = server.get("/v1/tokens", organization_id=server.organization_id(organization))
    if json:
        print_json(tokens)
        return
    rows = [
        (
            token["name"],
            token["prefix"] + "...",
            token["dialect"],
            " ".join(token["scopes"]),
            token["created_at"],
            token["last_used_at"] or "never",
            token["revoked_at"] or "no",
            token["id"],
        )
        for token in tokens
    ]
    print_table(
        ("NAME", "TOKEN", "DIALECT", "SCOPES", "CREATED", "LAST USED", "REVOKED", "ID"), rows, empty="no tokens"
    )


@app.command()
def revoke(
    ctx: typer.Context,
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="Id, name, or the first characters as listed.")],
    organization: Organization = None,
    json: Json = False,
) -> None:
    """Make a token useless from now on."""
    server = connect(ctx)
    within = {"organization_id": server.organization_id(organization)}
    tokens = [one for one in server.get("/v1/tokens", **within) if one["revoked_at"] is None]
    prefix = token.removesuffix("...")
    found = [one for one in tokens if token in (one["id"], one["name"]) or prefix == one["prefix"]]
    if not found:
        fail(f"there is no valid token '{token}': see inn token list")
    if len(found) > 1:
        fail(f"'{token}' names {len(found)} tokens: give the id")
    server.call("DELETE", f"/v1/tokens/{found[0]['id']}", query=within)
    if json:
        print_json({"id": found[0]["id"], "revoked": True})
    else:
        say(f"revoked token '{found[0]['name']}' ({found[0]['prefix']}...)")
