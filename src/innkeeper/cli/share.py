"""`inn share`: published ports of VMs."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

from innkeeper.cli.connection import connect, encode_segment
from innkeeper.cli.options import Json
from innkeeper.cli.printing import print_fields, print_json, print_table, say


class _CreatesByDefault(TyperGroup):
    """`inn share VM PORT` is `inn share create VM PORT`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        first = next((word for word in args if not word.startswith("-")), None)
        if first is not None and first not in self.commands:
            args = ["create", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    help="Published ports of VMs. `inn share VM PORT` is short for `inn share create VM PORT`.",
    no_args_is_help=True,
    cls=_CreatesByDefault,
)
Share = Annotated[str, typer.Argument(metavar="SHARE", help="Id of the share, see inn share list.", show_default=False)]


@app.command()
def create(
    ctx: typer.Context,
    vm: Annotated[str, typer.Argument(metavar="VM", help="Id of the VM (vm_...).", show_default=False)],
    port: Annotated[int, typer.Argument(metavar="PORT", min=1, max=65_535, show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Open it to everybody who knows its name.")] = False,
    json: Json = False,
) -> None:
    """Publish a port of a VM under a host name of its own, until the VM ends. It is private unless --public says otherwise."""
    answer = connect(ctx).call("POST", "/v1/shares", {"vm_id": vm, "port": port, "is_public": public})
    if json:
        print_json(answer)
        return
    print_fields(
        (
            ("share", answer["share_id"]),
            ("url", answer["url"]),
            ("port", answer["port"]),
            ("open to", _openness(answer["is_public"])),
        )
    )


@app.command("list")
def list_(
    ctx: typer.Context,
    vm: Annotated[str | None, typer.Option(metavar="ID", help="Only those of this VM.")] = None,
    json: Json = False,
) -> None:
    """List the shares."""
    found = connect(ctx).get("/v1/shares", vm_id=vm)
    if json:
        print_json(found)
        return
    rows = [
        (one["share_id"], one["vm_id"], one["port"], _openness(one["is_public"]), one["created_at"], one["url"])
        for one in found
    ]
    print_table(("SHARE", "VM", "PORT", "OPEN TO", "CREATED", "URL"), rows, empty="no shares")


@app.command()
def rm(ctx: typer.Context, share: Share, json: Json = False) -> None:
    """Take a share away: its name leads nowhere from now on, and its links are void."""
    answer = connect(ctx).call("DELETE", f"/v1/shares/{encode_segment(share)}")
    if json:
        print_json(answer)
    else:
        say(f"revoked share {share}")


@app.command()
def link(
    ctx: typer.Context,
    share: Share,
    seconds: Annotated[int, typer.Option(min=1, max=604_800, help="How long the link opens the share.")] = 3_600,
    json: Json = False,
) -> None:
    """Print a link that opens a private share to whoever has it."""
    answer = connect(ctx).call("POST", f"/v1/shares/{encode_segment(share)}/link", {"expires_in_seconds": seconds})
    if json:
        print_json(answer)
    else:
        say(answer["url"])


def _openness(is_public: bool) -> str:
    return "everybody" if is_public else "tokens and links"
