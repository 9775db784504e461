"""`inn image import`: from a registry by reference, or from an archive or a folder of this machine, which is sent to the server."""

from __future__ import annotations

import contextlib
import os
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from innkeeper.cli.build_log import follow
from innkeeper.cli.connection import Server, connect, encode_segment, refused
from innkeeper.cli.options import Json
from innkeeper.cli.printing import USAGE, fail, print_json, say, visible_lines

if TYPE_CHECKING:
    from typing import IO

PIECE_BYTES = 262_144
# Prefix -> how the server is told. `oci:` is a folder, which travels as the archive of it.
LOCAL = {"oci-archive:": "oci-archive", "docker-archive:": "docker-archive", "oci:": "oci-archive"}


def import_(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the image, with a tag if you like.")],
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[FROM]",
            help="docker://REGISTRY/PATH:TAG (or that without docker://), oci-archive:FILE, docker-archive:FILE or oci:FOLDER.",
        ),
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Print the log of its newest import, and follow it.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Give up the import that is going on.")] = False,
    json: Json = False,
) -> None:
    """Make an image of an OCI image. Files are read here and sent; the exit status is 1 when the import failed."""
    if (source is not None) + log + cancel != 1:
        fail("one of FROM, --log and --cancel is needed", status=USAGE)
    server = connect(ctx)
    path = f"/v1/images/{encode_segment(name)}"
    if cancel:
        server.call("DELETE", f"{path}/import")
        return
    if source is not None:
        _begin(server, name, path, source)
    _follow(server, name, path, json=json)


def _begin(server: Server, name: str, path: str, source: str) -> None:
    for prefix, kind in LOCAL.items():
        if source.startswith(prefix):
            _send(server, path, kind, Path(source.removeprefix(prefix)), folder=prefix == "oci:")
            return
    if source.startswith(("/", "./", "../")):
        fail(f"say what {source} is: oci-archive:, docker-archive: or oci: before it", status=USAGE)
    server.call("POST", "/v1/images", {"name": name, "reference": source.removeprefix("docker://")})


def _send(server: Server, path: str, kind: str, source: Path, *, folder: bool) -> None:
    if folder and not (source / "oci-layout").is_file():
        fail(f"{source} is not an OCI layout: it has no file oci-layout", status=USAGE)
    if not folder and not source.is_file():
        fail(f"{source} is not a file", status=USAGE)
    headers = {"Content-Type": "application/octet-stream"}
    pieces = _folder_pieces(source) if folder else _file_pieces(source)
    with server.stream("PUT", f"{path}/archive?format={kind}", content=pieces, headers=headers) as response:
        if response.is_error:
            refused(response)
        response.read()


def _file_pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _folder_pieces(folder: Path) -> Iterator[bytes]:
    """The folder as a tar stream, made while it is sent."""
    read_end, write_end = os.pipe()

    def write() -> None:
        with os.fdopen(write_end, "wb") as out, tarfile.open(fileobj=out, mode="w|") as archive:
            archive.add(folder, arcname=".")

    writer = threading.Thread(target=_quietly(write), daemon=True)
    writer.start()
    with os.fdopen(read_end, "rb") as file:
        yield from _pieces(file)
    writer.join()


def _quietly(write: Any) -> Any:
    def run() -> None:
        # The server refused, and nobody reads on.
        with contextlib.suppress(BrokenPipeError):
            write()

    return run


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece


def _follow(server: Server, name: str, path: str, *, json: bool) -> None:
    end = follow(
        server,
        f"{path}/import/events",
        show=None if json else _print,
        goes_on=f"stopped reading; the import goes on: inn image import {name} --log, or --cancel",
        cut_short=f"the log ends before the import: see inn image show {name}",
    )
    if end["error"] is not None:
        print(visible_lines(f"inn: {end['error']}"), file=sys.stderr)
        raise SystemExit(1)
    image: dict[str, Any] = server.get(path)
    if json:
        print_json(image)
    else:
        say(f"imported {name} ({image['digest'][:12]})")


def _print(event: str, data: dict[str, Any]) -> None:
    if event == "step":
        say(f"{data['text']}")
    elif event == "output":
        print("  " + visible_lines(data["data"].rstrip("\n")), flush=True)
