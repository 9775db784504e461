"""`inn ssh-key`: public keys that open the organization's VMs by SSH."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import USAGE, fail, print_json, print_table, say

# Of a line in a file, whatever file was named.
READ_BYTES = 65_536
app = typer.Typer(help="Public keys that open the organization's VMs by SSH.", no_args_is_help=True)


@app.command()
def add(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pub file; - is standard input.")],
    json: Json = False,
) -> None:
    """Let the holder of a key in to every VM of the organization. A key that is there already is answered as it is."""
    try:
        if str(file) == "-":
            content = sys.stdin.buffer.read(READ_BYTES)
        else:
            with file.open("rb") as opened:
                content = opened.read(READ_BYTES)
    except OSError as error:
        fail(f"{file}: {error.strerror}", status=USAGE)
    if b"PRIVATE KEY" in content:
        # It must not leave this machine, not even to be refused.
        fail(f"{file} is a private key: name the file whose name ends in .pub", status=USAGE)
    line = content.decode("utf-8", "replace").strip()
    added: dict[str, Any] = connect(ctx).call("POST", "/v1/ssh-keys", {"public_key": line})
    if json:
        print_json(added)
    else:
        say(f"{added['id']} {added['fingerprint']} {added['comment']}".rstrip())


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """List the organization's keys."""
    keys: list[dict[str, Any]] = connect(ctx).get("/v1/ssh-keys")["keys"]
    if json:
        print_json(keys)
        return
    rows = [(str(key["id"]), key["fingerprint"], key["comment"], key["created_at"][:19]) for key in keys]
    print_table(("ID", "FINGERPRINT", "COMMENT", "CREATED"), rows, empty="no SSH keys")


@app.command()
def rm(
    ctx: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="Its id or its fingerprint, as listed.")],
    json: Json = False,
) -> None:
    """Forget a key; the SSH connections that stand on it end."""
    server = connect(ctx)
    keys: list[dict[str, Any]] = server.get("/v1/ssh-keys")["keys"]
    found = next((one for one in keys if key in (str(one["id"]), one["fingerprint"])), None)
    if found is None:
        fail(f"there is no SSH key '{key}': see inn ssh-key list")
    server.call("DELETE", f"/v1/ssh-keys/{found['id']}")
    if json:
        print_json({"id": found["id"], "removed": True})
    else:
        say(f"removed {found['id']} ({found['fingerprint']})")
