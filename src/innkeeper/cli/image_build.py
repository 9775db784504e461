"""`inn image build`, and what belongs to it: builds, log, cancel."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from innkeeper.cli.build_context import read_rules, tar_pieces
from innkeeper.cli.build_log import BuildPrinter, follow
from innkeeper.cli.connection import connect, encode_segment, refused
from innkeeper.cli.options import Json
from innkeeper.cli.printing import USAGE, fail, print_json, print_table, say, visible_lines
from innkeeper.cli.profile import parse_env

if TYPE_CHECKING:
    from innkeeper.cli.connection import Server

UUID_PATTERN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def build(
    ctx: typer.Context,
    path: Annotated[
        Path, typer.Argument(metavar="DIR|DOCKERFILE", help="Folder to send, or a Dockerfile that needs no files.")
    ],
    tag: Annotated[
        str | None, typer.Option("--tag", "-t", metavar="NAME", help="Name of the image; default: the folder's.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="The Dockerfile; default: the one in the folder.")
    ] = None,
    build_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V", help="Value of an ARG, repeatable; 'K' alone takes the value from your own environment."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Stage to build; default: the last one.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Run every step anew.")] = False,
    egress: Annotated[str, typer.Option(help="What RUN may reach: internet or none.")] = "internet",
    json: Json = False,
) -> None:
    """Build an image of a Dockerfile, in guests of its own. It goes on when this command is interrupted."""
    whole = path.is_dir()
    dockerfile = file or (path / "Dockerfile" if whole else path)
    try:
        text = dockerfile.read_text()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {dockerfile}: {error}", status=USAGE)
    rules = read_rules(path) if whole else []
    body = {
        "name": tag or _default_name(path if whole else path.parent),
        "dockerfile": text,
        "build_args": parse_env(build_arg) if build_arg else {},
        "target": target,
        "cache": not no_cache,
        "context": whole,
        "egress": egress,
    }
    server = connect(ctx)
    made: dict[str, Any] = server.call("POST", "/v1/image-builds", body)
    if whole:
        _send(server, made["id"], tar_pieces(path, rules))
    _follow(server, made, json=json)


def _default_name(folder: Path) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("._-")[:63]
    return name or fail("give the image a name with -t", status=USAGE)


def _send(server: Server, build_id: str, pieces: Iterator[bytes]) -> None:
    headers = {"Content-Type": "application/x-tar"}
    with server.stream("PUT", f"/v1/image-builds/{build_id}/context", content=pieces, headers=headers) as response:
        if response.is_error:
            refused(response)
        response.read()


def log(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME|BUILD", help="An image, whose newest build is meant; or a build.")
    ],
) -> None:
    """Print the log of a build, and go on while it does. The exit status is 1 when the build failed."""
    server = connect(ctx)
    _follow(server, _find(server, name), json=False)


def cancel(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME|BUILD", help="An image, whose newest build is meant; or a build.")
    ],
) -> None:
    """Stop a build."""
    server = connect(ctx)
    stopped = server.call("POST", f"/v1/image-builds/{_find(server, name)['id']}/cancel", {})
    say(stopped["status"])


def builds(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Of this image only.")] = None,
    json: Json = False,
) -> None:
    """List the newest builds."""
    found: list[dict[str, Any]] = connect(ctx).get("/v1/image-builds", name=name)
    if json:
        print_json(found)
        return
    rows = [
        (
            one["id"],
            one["name"],
            one["status"],
            one["created_at"][:19],
            (one["error"] or "").split("\n")[0][:100] or None,
        )
        for one in found
    ]
    print_table(("BUILD", "NAME", "STATUS", "BEGAN", "ERROR"), rows, empty="no builds")


def _find(server: Server, name: str) -> dict[str, Any]:
    if UUID_PATTERN.fullmatch(name):
        return dict(server.get(f"/v1/image-builds/{encode_segment(name)}"))
    found: list[dict[str, Any]] = server.get("/v1/image-builds", name=name, limit=1)
    if not found:
        fail(f"there is no build of {name!r}: see inn image builds")
    return found[0]


def _follow(server: Server, made: dict[str, Any], *, json: bool) -> None:
    end = follow(
        server,
        f"/v1/image-builds/{made['id']}/events",
        show=None if json else BuildPrinter(),
        goes_on=f"stopped reading; the build goes on: inn image log {made['id']}, inn image cancel {made['id']}",
        cut_short=f"the server ended the stream before the build: inn image log {made['id']}",
    )
    if json:
        print_json(server.get(f"/v1/image-builds/{made['id']}"))
    elif end["status"] == "ready":
        say(f"built {made['name']} ({end['digest'][:12]})")
    else:
        print(visible_lines(f"inn: {end['status']}: {end['error']}"), file=sys.stderr)
    if end["status"] != "ready":
        raise SystemExit(1)
