"""`inn gc`: what takes disk space and nothing needs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import USAGE, fail, human_size, print_json, print_table, say


def gc(
    ctx: typer.Context,
    host: Annotated[
        str | None,
        typer.Argument(metavar="[HOST]", help="Name or id; not needed where there is one.", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only listed.")] = False,
    volumes: Annotated[
        bool, typer.Option("--volumes", help="With --yes: remove volumes that nobody has, too. They are users' data.")
    ] = False,
    json: Json = False,
) -> None:
    """List what takes disk space on a host and nothing needs, with sizes; remove it with --yes. Safe while the server runs.

    Files of images that nobody names and nothing stands on, temporary files older than an hour, what was left of removed rooms, guest agents of
    earlier versions that no guest uses, kernels that new microVMs do not boot, journals beyond a room's limits. Volumes that the database does not know are
    listed, and stay but for --volumes. Snapshots and checkpoints that a retention policy gives up go by themselves: inn retention.
    """
    if volumes and not yes:
        fail("--volumes goes with --yes", status=USAGE)
    server = connect(ctx)
    path = f"/v1/hosts/{server.host(host)['id']}/gc"
    found: dict[str, Any] = server.call("POST", path, {"remove": yes, "remove_volumes": volumes})
    if json:
        print_json(found)
        return
    rows = [(one["kind"], one["name"], human_size(one["size_bytes"])) for one in found["items"]]
    print_table(("KIND", "NAME", "SIZE"), rows, empty="nothing")
    held = sum(one["size_bytes"] for one in found["items"] if one["kind"] == "volume" and not yes)
    say(f"{'removed' if yes else 'to be removed with --yes'}: {human_size(found['total_bytes'] - held)}")
    if held:
        say(f"to be removed with --yes --volumes: {human_size(held)} more")
