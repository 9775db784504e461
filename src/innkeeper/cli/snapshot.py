"""`inn snapshot`: kept moments of VMs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from innkeeper.cli import snapshot_build
from innkeeper.cli.connection import connect, encode_segment
from innkeeper.cli.options import Json
from innkeeper.cli.printing import print_fields, print_json, print_table, say

app = typer.Typer(help="Snapshots: kept moments of VMs and images, from which others begin.", no_args_is_help=True)
app.command()(snapshot_build.build)
app.command()(snapshot_build.log)

Snapshot = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Id of the snapshot, see inn snapshot list.")]


@app.command()
def take(
    ctx: typer.Context,
    vm: Annotated[str, typer.Argument(metavar="VM", help="Id of a VM, vm_…")],
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="What it is called; default: the VM's id.")] = None,
    memory: Annotated[bool, typer.Option(help="With what runs in the VM; without, the disk alone.")] = True,
    wait: Annotated[bool, typer.Option(help="Answer when it is ready.")] = True,
    json: Json = False,
) -> None:
    """Take a snapshot of a VM, which goes on."""
    body: dict[str, Any] = {"memory": memory} if name is None else {"memory": memory, "name": name}
    path = f"/v1/vms/{encode_segment(vm)}/snapshot"
    answer = connect(ctx).call("POST", path, body, query={"wait": str(wait).lower()})
    if json:
        print_json(answer)
        return
    print_fields(
        (
            ("snapshot", answer["id"]),
            ("status", answer["status"]),
            ("bytes", answer["size_bytes"]),
            ("vm away for ms", answer["downtime_ms"]),
        )
    )


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """List the snapshots, newest first. OWN is what would be free without one."""
    found = connect(ctx).get("/v1/snapshots")
    if json:
        print_json(found)
        return
    rows = [
        (
            one["id"],
            one["name"],
            one["status"],
            _of(one),
            one["size_bytes"],
            one["own_bytes"],
            one["created_at"],
            one["vm_id"] or one["oci_image"],
        )
        for one in found
    ]
    columns = ("SNAPSHOT", "NAME", "STATUS", "OF", "BYTES", "OWN", "CREATED", "VM OR IMAGE")
    print_table(columns, rows, empty="no snapshots")


@app.command()
def show(ctx: typer.Context, snapshot: Snapshot, json: Json = False) -> None:
    """Show a snapshot: what it holds, what it takes, and what came of it."""
    detail = connect(ctx).get(_path(snapshot))
    if json:
        print_json(detail)
        return
    names = (
        "name", "status", "error", "created_at", "vm_id", "oci_image", "memory", "downtime_ms", "size_bytes", "disk_bytes", "memory_bytes", "own_bytes",
        "shared_bytes", "vcpu_count", "memory_mb", "disk_mb", "driver", "image", "image_digest", "parent_id", "disk_digest", "verified_at",
    )  # fmt: skip
    print_fields(
        (
            ("snapshot", detail["id"]),
            *((name.replace("_", " "), detail[name]) for name in names),
            ("children", ", ".join(detail["children"]) or None),
        )
    )


@app.command()
def rename(
    ctx: typer.Context,
    snapshot: Snapshot,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its new name.")],
    json: Json = False,
) -> None:
    """Call a snapshot something else."""
    answer = connect(ctx).call("PATCH", _path(snapshot), {"name": name})
    if json:
        print_json(answer)
    else:
        say(f"renamed {snapshot} to {answer['name']}")


@app.command()
def verify(ctx: typer.Context, snapshot: Snapshot, json: Json = False) -> None:
    """Start a snapshot in a guest that goes afterwards, and tell whether it is what was taken; exit code 1 where it is not."""
    answer = connect(ctx).call("POST", f"{_path(snapshot)}/verify", {})
    if json:
        print_json(answer)
    else:
        shown = {True: "ok", False: "FAILED", None: "not told"}
        rows = [(one["name"], shown[one["ok"]], one["detail"]) for one in answer["checks"]]
        print_table(("CHECK", "RESULT", "DETAIL"), rows, empty="nothing was checked")
    if answer["damaged"]:
        raise typer.Exit(1)


@app.command()
def rm(ctx: typer.Context, snapshot: Snapshot, json: Json = False) -> None:
    """Delete a snapshot; VMs that began with it keep what they have."""
    answer = connect(ctx).call("DELETE", _path(snapshot))
    if json:
        print_json(answer)
    else:
        say(f"deleted {snapshot}")


def _of(one: dict[str, Any]) -> str:
    if one["oci_image"] is not None:
        return "image"
    return "disk, memory" if one["memory"] else "disk"


def _path(snapshot: str) -> str:
    return f"/v1/snapshots/{encode_segment(snapshot)}"
