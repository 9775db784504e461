"""`inn profile`: templates that rooms are made from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json, Profile
from innkeeper.cli.printing import USAGE, fail, print_fields, print_json, print_table, say

app = typer.Typer(help="Templates that rooms are made from.", no_args_is_help=True)

File = Annotated[Path | None, typer.Option("--file", "-f", help="TOML file with the fields; options win over it.")]
Image = Annotated[str | None, typer.Option(help="Image that rooms start from.")]
VcpuCount = Annotated[int | None, typer.Option(help="Virtual processors, 1-64.")]
MemoryMb = Annotated[int | None, typer.Option(help="Memory in MiB.")]
DiskMb = Annotated[int | None, typer.Option(help="Disk in MiB.")]
Env = Annotated[
    list[str] | None,
    typer.Option(
        metavar="K=V", help="Environment variable, repeatable; 'K' alone takes the value from your own environment."
    ),
]
User = Annotated[str | None, typer.Option(help="User that commands run as; '' for the image's.")]
Workdir = Annotated[str | None, typer.Option(help="Working directory of commands; '' for the image's.")]
Egress = Annotated[str | None, typer.Option(help="What rooms may connect to: internet or none.")]
Driver = Annotated[str | None, typer.Option(help="auto, gvisor or qemu.")]
MinIsolation = Annotated[
    str | None, typer.Option(help="Weakest isolation that is acceptable: none, gvisor or microvm.")
]
WarmPoolSize = Annotated[int | None, typer.Option(help="Ready guests kept for new rooms.")]
IdleSeconds = Annotated[str | None, typer.Option(help="A room that was idle this long is destroyed; 'never' keeps it.")]
CommandTimeoutSeconds = Annotated[
    int | None, typer.Option(help="Time limit of a command that does not bring its own, 1-3600.")
]
PublicFiles = Annotated[
    str | None, typer.Option(help="Files that public_url serves without a token: reported, all or off.")
]


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Name; may stand in the file instead.", show_default=False)
    ] = None,
    file: File = None,
    image: Image = None,
    vcpu_count: VcpuCount = None,
    memory_mb: MemoryMb = None,
    disk_mb: DiskMb = None,
    env: Env = None,
    user: User = None,
    workdir: Workdir = None,
    egress: Egress = None,
    driver: Driver = None,
    min_isolation: MinIsolation = None,
    warm_pool_size: WarmPoolSize = None,
    idle_seconds: IdleSeconds = None,
    command_timeout_seconds: CommandTimeoutSeconds = None,
    public_files: PublicFiles = None,
    json: Json = False,
) -> None:
    """Create a profile. Only a name and an image are required."""
    body = _body(file, locals())
    for field in ("name", "image"):
        if field not in body:
            fail(f"a profile needs {'a name' if field == 'name' else 'an image (--image)'}", status=USAGE)
    _show(connect(ctx).call("POST", "/api/profiles", body), json=json)


@app.command()
def update(
    ctx: typer.Context,
    profile: Profile,
    file: File = None,
    name: Annotated[str | None, typer.Option(help="New name.")] = None,
    image: Image = None,
    vcpu_count: VcpuCount = None,
    memory_mb: MemoryMb = None,
    disk_mb: DiskMb = None,
    env: Env = None,
    user: User = None,
    workdir: Workdir = None,
    egress: Egress = None,
    driver: Driver = None,
    min_isolation: MinIsolation = None,
    warm_pool_size: WarmPoolSize = None,
    idle_seconds: IdleSeconds = None,
    command_timeout_seconds: CommandTimeoutSeconds = None,
    public_files: PublicFiles = None,
    json: Json = False,
) -> None:
    """Change fields of a profile; the others stay. --env replaces the whole environment."""
    body = _body(file, locals())
    if not body:
        fail("nothing to change: give an option or --file", status=USAGE)
    server = connect(ctx)
    _show(server.call("PATCH", f"/api/profile/{server.profile_id(profile)}", body), json=json)


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """List the profiles."""
    profiles: list[dict[str, Any]] = connect(ctx).get("/api/profiles")
    if json:
        print_json(profiles)
        return
    columns = ("NAME", "IMAGE", "VCPUS", "MEMORY MB", "DISK MB", "EGRESS", "DRIVER", "WARM", "ID")
    fields = ("name", "image", "vcpu_count", "memory_mb", "disk_mb", "egress_policy", "driver", "warm_pool_size", "id")
    print_table(
        columns, [[_plain(name, profile[name]) for name in fields] for profile in profiles], empty="no profiles"
    )


@app.command()
def show(ctx: typer.Context, profile: Profile, json: Json = False) -> None:
    """Show one profile. Values of its environment are never shown."""
    server = connect(ctx)
    _show(server.get(f"/api/profile/{server.profile_id(profile)}"), json=json)


@app.command()
def delete(ctx: typer.Context, profile: Profile, json: Json = False) -> None:
    """Delete a profile that has no rooms."""
    server = connect(ctx)
    identifier = server.profile_id(profile)
    server.call("DELETE", f"/api/profile/{identifier}")
    if json:
        print_json({"id": identifier, "deleted": True})
    else:
        say(f"deleted profile {profile}")


def _show(profile: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(profile)
    else:
        print_fields((name, _plain(name, value)) for name, value in profile.items())


def _plain(name: str, value: Any) -> object:
    if name == "egress_policy":
        return value["mode"]
    if name == "env":
        return ", ".join(value) or None
    if name == "idle_seconds" and value is None:
        return "never"
    return value


# Options whose name is the field's.
_FIELDS = (
    "name", "image", "vcpu_count", "memory_mb", "disk_mb", "user", "workdir", "driver", "min_isolation", "warm_pool_size",
    "command_timeout_seconds", "public_files",
)  # fmt: skip


def _body(file: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The request's fields: those of the TOML file, then the options that were given."""
    body = _read_toml(file) if file is not None else {}
    body.update({name: options[name] for name in _FIELDS if options[name] is not None})
    if options["env"] is not None:
        body["env"] = parse_env(options["env"])
    if options["egress"] is not None:
        body["egress_policy"] = {"mode": options["egress"]}
    if options["idle_seconds"] is not None:
        body["idle_seconds"] = options["idle_seconds"]
    for name in ("user", "workdir"):
        if body.get(name) == "":
            body[name] = None
    if isinstance(body.get("idle_seconds"), str):
        body["idle_seconds"] = _idle(body["idle_seconds"])
    return body


def _idle(text: str) -> int | None:
    if text == "never":
        return None
    if not (text.isascii() and text.isdigit()):
        fail(f"--idle-seconds: '{text}' is neither a number of seconds nor 'never'", status=USAGE)
    return int(text)


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"cannot read {path}: {error}", status=USAGE)


def parse_env(items: list[str]) -> dict[str, str]:
    """Variables from `K=V`, or `K` for the caller's own value, so that a secret need not stand on the command line."""
    env = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            if name not in os.environ:
                fail(f"--env {name}: not set in your environment; write {name}=VALUE", status=USAGE)
            value = os.environ[name]
        env[name] = value
    return env
