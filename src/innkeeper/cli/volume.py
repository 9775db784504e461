"""`inn volume`: storage that outlives VMs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from innkeeper.cli import volume_files
from innkeeper.cli.connection import connect, encode_segment
from innkeeper.cli.options import Json
from innkeeper.cli.printing import print_fields, print_json, print_table, say

app = typer.Typer(help="Volumes: storage that outlives VMs.", no_args_is_help=True)
app.add_typer(volume_files.app, name="files")

MIB = 1 << 20

Volume = Annotated[str, typer.Argument(metavar="VOLUME", help="Id of the volume, see inn volume list.")]
Vm = Annotated[str, typer.Argument(metavar="VM", help="Id of a VM, vm_…")]
SizeMb = Annotated[int, typer.Argument(metavar="MIB", help="Its quota in MiB.", min=1)]


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is called.")],
    size_mb: SizeMb,
    json: Json = False,
) -> None:
    """Make an empty volume."""
    answer = connect(ctx).call("POST", "/v1/volumes", {"name": name, "quota_bytes": size_mb * MIB})
    if json:
        print_json(answer)
    else:
        print_fields((("volume", answer["id"]), ("quota bytes", answer["quota_bytes"]), ("status", answer["status"])))


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """List the volumes, newest first."""
    found = connect(ctx).get("/v1/volumes")
    if json:
        print_json(found)
        return
    rows = [
        (one["id"], one["name"], one["status"], one["quota_bytes"], one["used_bytes"], one["created_at"], _users(one))
        for one in found
    ]
    columns = ("VOLUME", "NAME", "STATUS", "QUOTA", "USED", "CREATED", "MOUNTED")
    print_table(columns, rows, empty="no volumes")


@app.command()
def show(ctx: typer.Context, volume: Volume, json: Json = False) -> None:
    """Show a volume and who has it."""
    detail = connect(ctx).get(_path(volume))
    if json:
        print_json(detail)
        return
    names = ("name", "status", "error", "created_at", "quota_bytes", "used_bytes", "guest_written")
    fields = ((name.replace("_", " "), detail[name]) for name in names)
    print_fields((("volume", detail["id"]), *fields, ("mounted", _users(detail))))


@app.command()
def rename(
    ctx: typer.Context,
    volume: Volume,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its new name.")],
    json: Json = False,
) -> None:
    """Call a volume something else."""
    answer = connect(ctx).call("PATCH", _path(volume), {"name": name})
    if json:
        print_json(answer)
    else:
        say(f"renamed {volume} to {answer['name']}")


@app.command()
def grow(ctx: typer.Context, volume: Volume, size_mb: SizeMb, json: Json = False) -> None:
    """Give a volume that no VM has a larger quota."""
    answer = connect(ctx).call("PATCH", _path(volume), {"quota_bytes": size_mb * MIB})
    if json:
        print_json(answer)
    else:
        say(f"{volume} holds {answer['quota_bytes']} bytes")


@app.command()
def rm(ctx: typer.Context, volume: Volume, json: Json = False) -> None:
    """Delete a volume, with what is in it."""
    answer = connect(ctx).call("DELETE", _path(volume))
    if json:
        print_json(answer)
    else:
        say(f"deleted {volume}")


@app.command()
def mount(
    ctx: typer.Context,
    volume: Volume,
    vm: Vm,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Absolute, in the VM; nothing or an empty directory.")],
    read_only: Annotated[bool, typer.Option("--read-only", help="The VM may not write it.")] = False,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="ID", help="This checkpoint of it instead, or `latest`; read-only.")
    ] = None,
    json: Json = False,
) -> None:
    """Have a VM that runs see a volume."""
    body: dict[str, Any] = {"volume_id": volume, "mount_path": path, "mode": "ro" if read_only or checkpoint else "rw"}
    if checkpoint is not None:
        body["checkpoint_id"] = checkpoint
    answer = connect(ctx).call("POST", f"/v1/vms/{encode_segment(vm)}/volumes", body)
    if json:
        print_json(answer)
    else:
        say(f"mounted at {answer['mount_path']} ({answer['mode']})")


@app.command()
def unmount(
    ctx: typer.Context,
    volume: Volume,
    vm: Vm,
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help="Where, if the VM has checkpoints of it too.")
    ] = None,
    json: Json = False,
) -> None:
    """Take a volume from a VM; everything that was written is on it then."""
    where = f"/v1/vms/{encode_segment(vm)}/volumes/{encode_segment(volume)}"
    answer = connect(ctx).call("DELETE", where, query={} if path is None else {"mount_path": path})
    if json:
        print_json(answer)
    else:
        say(f"unmounted from {answer['mount_path']}")


@app.command()
def checkpoint(
    ctx: typer.Context,
    volume: Volume,
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="What it is called; default: the time.")] = None,
    json: Json = False,
) -> None:
    """Keep a volume as it is now; nobody can ever write that."""
    answer = connect(ctx).call("POST", f"{_path(volume)}/checkpoints", {} if name is None else {"name": name})
    if json:
        print_json(answer)
    else:
        print_fields((("checkpoint", answer["id"]), ("name", answer["name"]), ("status", answer["status"])))


@app.command()
def checkpoints(ctx: typer.Context, volume: Volume, json: Json = False) -> None:
    """List a volume's checkpoints, newest first."""
    found = connect(ctx).get(f"{_path(volume)}/checkpoints")
    if json:
        print_json(found)
        return
    rows = [(one["id"], one["name"], one["status"], one["used_bytes"], one["created_at"], _users(one)) for one in found]
    print_table(("CHECKPOINT", "NAME", "STATUS", "USED", "CREATED", "MOUNTED"), rows, empty="no checkpoints")


@app.command("rm-checkpoint")
def rm_checkpoint(
    ctx: typer.Context,
    volume: Volume,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Id of the checkpoint.")],
    json: Json = False,
) -> None:
    """Delete a checkpoint of a volume."""
    answer = connect(ctx).call("DELETE", f"{_path(volume)}/checkpoints/{encode_segment(checkpoint)}")
    if json:
        print_json(answer)
    else:
        say(f"deleted {checkpoint}")


def _path(volume: str) -> str:
    return f"/v1/volumes/{encode_segment(volume)}"


def _users(one: dict[str, Any]) -> str:
    return ", ".join(f"{user['vm_id']}:{user['mount_path']} ({user['mode']})" for user in one["mounts"])
