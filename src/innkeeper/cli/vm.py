"""`inn vm`: VMs, each with a lifetime."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import Annotated, Any
from urllib.parse import quote

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import USAGE, fail, print_fields, print_json, print_table, say
from innkeeper.cli.profile import Driver, MinIsolation, parse_env

app = typer.Typer(help="VMs: guest computers by an id of their own, each with a lifetime.", no_args_is_help=True)

Vm = Annotated[str, typer.Argument(metavar="VM", help="Id of a VM, vm_…")]
Lifetime = Annotated[int | None, typer.Option(metavar="SECONDS", help="How long it lives; default: the server's.")]
Memory = Annotated[int | None, typer.Option(metavar="MIB", help="Memory; default: the server's.")]
Idle = Annotated[int | None, typer.Option(metavar="SECONDS", help="End it when it was idle this long; default: never.")]
Metadata = Annotated[list[str] | None, typer.Option(metavar="NAME=TEXT", help="Say something of it; may be repeated.")]

AutoSuspend = Annotated[bool | None, typer.Option(help="Suspend it where it would end; default: end it.")]
AutoResume = Annotated[bool | None, typer.Option(help="Wake it when it is used while suspended; default: wake it.")]


@app.command()
def create(
    ctx: typer.Context,
    lifetime: Lifetime = None,
    memory: Memory = None,
    vcpus: Annotated[int | None, typer.Option(metavar="N", help="Processors; default: the server's.")] = None,
    image: Annotated[
        str | None, typer.Option(metavar="NAME", help="Variant or name of an image; default: standard.")
    ] = None,
    idle: Idle = None,
    metadata: Metadata = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V",
            help="Variable of all that runs in it, repeatable; 'K' alone takes the value from your own environment.",
        ),
    ] = None,
    driver: Driver = None,
    min_isolation: MinIsolation = None,
    snapshot: Annotated[str | None, typer.Option(metavar="ID", help="Begin with this snapshot.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Take a snapshot before it ends.")] = False,
    auto_suspend: AutoSuspend = None,
    auto_resume: AutoResume = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID:PATH[:ro[:CHECKPOINT]]",
            help="A volume that it is to have, repeatable; CHECKPOINT may be latest.",
        ),
    ] = None,
    session: Annotated[str | None, typer.Option(metavar="ID", help="Of this session, which may have one.")] = None,
    wait: Annotated[bool, typer.Option(help="Answer when it is up.")] = True,
    json: Json = False,
) -> None:
    """Make a VM."""
    wanted = {
        "vm_lifetime_seconds": lifetime,
        "memory_mb": memory,
        "vcpu_count": vcpus,
        "image_variant": image,
        "idle_seconds": idle,
        "metadata": _pairs(metadata) if metadata else None,
        "env": parse_env(env) if env else None,
        "driver": driver,
        "min_isolation": min_isolation,
        "snapshot_id": snapshot,
        "snapshot_on_terminate": True if keep else None,
        "auto_suspend": auto_suspend,
        "auto_resume": auto_resume,
        "volumes": [_mount(one) for one in volume] if volume else None,
        "session_id": session,
    }
    body = {name: value for name, value in wanted.items() if value is not None}
    answer = connect(ctx).call("POST", "/v1/vms", body, query={"wait": str(wait).lower()})
    if json:
        print_json(answer)
        return
    print_fields((("vm", answer["vm_id"]), ("session", answer["session_id"]), ("status", answer["status"])))


def _mount(text: str) -> dict[str, str]:
    """The volume of `ID:PATH[:ro|rw[:CHECKPOINT]]`."""
    parts = text.split(":")
    if not 2 <= len(parts) <= 4 or not all(parts):
        raise typer.BadParameter("not ID:PATH[:ro[:CHECKPOINT]]", param_hint="--volume")
    names = ("volume_id", "mount_path", "mode", "checkpoint_id")
    return dict(zip(names, parts, strict=False))


@app.command("list")
def list_(
    ctx: typer.Context,
    all_: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False,
    json: Json = False,
) -> None:
    """List the VMs, newest first."""
    found = [vm for vm in connect(ctx).get("/v1/vms/") if all_ or vm["ended_at"] is None]
    if json:
        print_json(found)
        return
    rows = [
        (
            vm["vm_id"],
            vm["end_reason"] or vm["status"],
            vm["image"],
            vm["vcpu_count"],
            vm["memory_mb"],
            vm["created_at"],
            vm["ended_at"] or vm["expires_at"],
            vm["session_id"],
        )
        for vm in found
    ]
    columns = ("VM", "STATUS", "IMAGE", "VCPUS", "MIB", "CREATED", "ENDS", "SESSION")
    print_table(columns, rows, empty="no VMs")


@app.command()
def show(ctx: typer.Context, vm: Vm, json: Json = False) -> None:
    """Show a VM: what it is made of, how it ends, and where its start time went."""
    server = connect(ctx)
    detail = server.get(_path(vm))
    events = server.get(f"{_path(vm)}/events")
    if json:
        print_json({**detail, "events": events})
        return
    isolation: dict[str, Any] = detail["isolation"] or {}
    names = (
        "status", "error", "end_reason", "session_id", "image", "image_digest", "vcpu_count", "memory_mb", "next_memory_mb", "disk_mb",
        "created_at", "expires_at", "ended_at", "last_active_at", "vm_lifetime_seconds", "idle_seconds", "hold_until", "hold_reason",
        "auto_suspend", "auto_resume", "suspend_reason", "woken_by", "env_status", "env_error",
        "snapshot_id", "restored", "snapshot_on_terminate",
    )  # fmt: skip
    print_fields(
        (
            ("vm", detail["vm_id"]),
            *((name.replace("_", " "), detail[name]) for name in names),
            ("metadata", jsonlib.dumps(detail["metadata"], ensure_ascii=False) if detail["metadata"] else None),
            ("egress policy", jsonlib.dumps(policy) if (policy := detail["egress_policy"]) else None),
            ("host", detail["host"]["name"] if detail["host"] else None),
            ("ssh host", detail["ssh_host"]),
            ("isolation", isolation.get("level")),
            ("driver", f"{isolation['driver']} ({isolation['platform']})" if isolation else None),
            ("because", isolation.get("reason")),
        )
    )
    print()
    sys.stdout.flush()
    print_table(("AT", "EVENT", "REASON"), [(event["at"], event["type"], event["reason"]) for event in events])


@app.command()
def patch(
    ctx: typer.Context,
    vm: Vm,
    lifetime: Annotated[int | None, typer.Option(metavar="SECONDS", help="How long it lives from now on.")] = None,
    memory: Annotated[int | None, typer.Option(metavar="MIB", help="Memory from its next start on.")] = None,
    idle: Annotated[
        int | None, typer.Option(metavar="SECONDS", help="End it when it was idle so long; 0: never.")
    ] = None,
    metadata: Metadata = None,
    keep: Annotated[
        bool | None, typer.Option("--keep/--no-keep", help="Take a snapshot before it ends, or not.")
    ] = None,
    auto_suspend: AutoSuspend = None,
    auto_resume: AutoResume = None,
    json: Json = False,
) -> None:
    """Change a VM."""
    body: dict[str, Any] = {}
    if keep is not None:
        body["snapshot_on_terminate"] = keep
    if lifetime is not None:
        body["vm_lifetime_seconds"] = lifetime
    if memory is not None:
        body["memory_mb"] = memory
    if idle is not None:
        body["idle_seconds"] = idle or None
    if metadata:
        body["metadata"] = _pairs(metadata)
    switches = {"auto_suspend": auto_suspend, "auto_resume": auto_resume}
    body |= {name: value for name, value in switches.items() if value is not None}
    if not body:
        fail("nothing to change: see inn vm patch --help", status=USAGE)
    answer = connect(ctx).call("PATCH", _path(vm), body)
    if json:
        print_json(answer)
    else:
        say(f"changed {vm}")


@app.command()
def hold(
    ctx: typer.Context,
    vm: Vm,
    seconds: Annotated[int, typer.Argument(metavar="SECONDS", help="From now on; 0 gives the lease back.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Kept with the VM.")] = "",
    json: Json = False,
) -> None:
    """Keep a VM for so long: its end moves there if it is nearer, and it is not idle until then."""
    answer = connect(ctx).call("POST", f"{_path(vm)}/hold", {"seconds": seconds, "reason": reason})
    if json:
        print_json(answer)
    else:
        say(f"{vm} lives until {answer['expires_at']}")


@app.command()
def suspend(ctx: typer.Context, vm: Vm, json: Json = False) -> None:
    """Keep a VM's memory on disk, and free what it runs on. Its next use wakes it, or inn vm resume."""
    answer = connect(ctx).call("POST", f"{_path(vm)}/suspend")
    if json:
        print_json(answer)
    else:
        say(f"{answer['status']} {vm}")


@app.command()
def resume(
    ctx: typer.Context,
    vm: Vm,
    wait: Annotated[bool, typer.Option(help="Answer when it is up.")] = True,
    json: Json = False,
) -> None:
    """Go on with a suspended VM. It gets a new id; the old one still names it."""
    answer = connect(ctx).call("POST", f"{_path(vm)}/resume", query={"wait": str(wait).lower()})
    if json:
        print_json(answer)
    else:
        print_fields((("vm", answer["vm_id"]), ("status", answer["status"])))


@app.command()
def clone(
    ctx: typer.Context,
    vm: Vm,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Keep the moment as a snapshot of this name.")
    ] = None,
    json: Json = False,
) -> None:
    """Make another VM that goes on from where this one is now."""
    answer = connect(ctx).call("POST", f"{_path(vm)}/clone", {"snapshot_name": name} if name else {})
    if json:
        print_json(answer)
    else:
        print_fields((("vm", answer["vm_id"]), ("session", answer["session_id"]), ("status", answer["status"])))


@app.command()
def fork(
    ctx: typer.Context,
    vm: Vm,
    count: Annotated[int, typer.Option(metavar="N", help="How many.", min=1, max=100)] = 1,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Keep the moment as a snapshot of this name.")
    ] = None,
    json: Json = False,
) -> None:
    """Make several VMs that go on from one moment of a VM."""
    body: dict[str, Any] = {"count": count, **({"snapshot_name": name} if name else {})}
    answer = connect(ctx).call("POST", f"{_path(vm)}/fork", body)
    if json:
        print_json(answer)
    else:
        rows = [(one["vm_id"], one["session_id"], one["status"], one["error"]) for one in answer["vms"]]
        print_table(("VM", "SESSION", "STATUS", "ERROR"), rows, empty="none")


@app.command()
def rm(ctx: typer.Context, vm: Vm, json: Json = False) -> None:
    """End a VM, with everything in it."""
    answer = connect(ctx).call("DELETE", _path(vm))
    if json:
        print_json(answer)
    else:
        say(f"ended {vm}")


def _path(vm: str) -> str:
    return f"/v1/vms/{quote(vm, safe='')}"


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            fail(f"--metadata {name}: write NAME=TEXT", status=USAGE)
        pairs[name] = value
    return pairs
