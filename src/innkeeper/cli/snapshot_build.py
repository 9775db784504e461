"""`inn snapshot build` and `log`: snapshots that are made of OCI images."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from innkeeper.cli.build_log import BuildPrinter, follow
from innkeeper.cli.connection import connect, encode_segment
from innkeeper.cli.options import Json
from innkeeper.cli.printing import print_json, say, visible_lines
from innkeeper.cli.profile import parse_env

if TYPE_CHECKING:
    from innkeeper.cli.connection import Server


def build(
    ctx: typer.Context,
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="REGISTRY/PATH:TAG (or with docker:// in front), of an OCI image.")
    ],
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="What it is called; default: the image.")] = None,
    vcpus: Annotated[int, typer.Option(metavar="N", help="Processors of its VMs, 1 to 8.")] = 2,
    memory: Annotated[int, typer.Option(metavar="MB", help="Memory of its VMs in MiB, 128 to 8192.")] = 512,
    disk: Annotated[
        int | None,
        typer.Option(metavar="GB", help="What its VMs can write, in GiB, 1 to 16; default: as for other VMs."),
    ] = None,
    apt: Annotated[str | None, typer.Option(metavar="NAMES", help="Debian packages, separated by spaces.")] = None,
    pip: Annotated[str | None, typer.Option(metavar="NAMES", help="Python packages, separated by spaces.")] = None,
    npm: Annotated[str | None, typer.Option(metavar="NAMES", help="Node packages, separated by spaces.")] = None,
    git: Annotated[str | None, typer.Option(metavar="URL", help="A repository, over https; becomes /app/repo.")] = None,
    branch: Annotated[str | None, typer.Option(metavar="NAME", help="Its branch or tag.")] = None,
    run: Annotated[str | None, typer.Option(metavar="LINE", help="Run last, by /bin/sh.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V",
            help="Variable of the build and of all that runs in its VMs, repeatable; 'K' alone takes the value from your own environment.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Print what the build says until it ends.")] = True,
    json: Json = False,
) -> None:
    """Make a snapshot of an OCI image. It goes on when this command is interrupted; the exit status is 1 when the build failed."""
    args = {
        "extra_apt_packages": apt,
        "extra_pip_packages": pip,
        "extra_npm_packages": npm,
        "git_clone_url": git,
        "git_clone_branch": branch,
        "disk_size_gb": disk,
        "envs": parse_env(env) if env else None,
        "post_build_cmd": run,
    }
    body: dict[str, Any] = {
        "oci_image": image.removeprefix("docker://"),
        "vcpu_count": vcpus,
        "memory_mb": memory,
        "build_args": {key: value for key, value in args.items() if value is not None},
    }
    if name is not None:
        body["name"] = name
    server = connect(ctx)
    made: dict[str, Any] = server.call("POST", "/v1/snapshots", body)
    if wait:
        _follow(server, made["id"], json=json)
    elif json:
        print_json(made)
    else:
        say(f"building {made['id']}")


def log(
    ctx: typer.Context,
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Id of a snapshot that was built.")],
) -> None:
    """Print what the build of a snapshot said, and go on while it does. The exit status is 1 when it failed."""
    _follow(connect(ctx), snapshot, json=False)


def _follow(server: Server, snapshot_id: str, *, json: bool) -> None:
    path = f"/v1/snapshots/{encode_segment(snapshot_id)}"
    end = follow(
        server,
        f"{path}/log",
        show=None if json else BuildPrinter(),
        goes_on=f"stopped reading; the build goes on: inn snapshot log {snapshot_id}, inn snapshot rm {snapshot_id}",
        cut_short=f"there is no end of a build in the log of {snapshot_id}: see inn snapshot show {snapshot_id}",
    )
    if json:
        print_json(server.get(path))
    elif end["status"] == "ready":
        say(f"built {snapshot_id}")
    else:
        print(visible_lines(f"inn: {end['status']}: {end['error']}"), file=sys.stderr)
    if end["status"] != "ready":
        raise SystemExit(1)
