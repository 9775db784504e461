"""`inn volume files`: what is in a volume, without a VM of one's own. Files go through as they come, whatever their size."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from innkeeper.cli.connection import Server, connect, encode_segment, refused
from innkeeper.cli.copying import CHUNK_BYTES, announced_chunks, local_name, written_whole
from innkeeper.cli.guest_files import spelled, unspelled
from innkeeper.cli.options import Json
from innkeeper.cli.printing import USAGE, fail, human_size, note, print_json, print_table, say

app = typer.Typer(help="Files of volumes, without a VM of one's own.", no_args_is_help=True)

STANDARD = "-"
FILE_MODE = 0o644

Volume = Annotated[str, typer.Argument(metavar="VOLUME", help="Id of the volume, see inn volume list.")]
InVolume = Annotated[str, typer.Argument(metavar="PATH", help="From the volume's top.")]


@app.command()
def ls(
    ctx: typer.Context,
    volume: Volume,
    prefix: Annotated[str, typer.Argument(metavar="[PREFIX]", help="How the paths begin.", show_default=False)] = "",
    shallow: Annotated[bool, typer.Option("--shallow", help="Not what is in directories below.")] = False,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=10_000)] = 1_000,
    json: Json = False,
) -> None:
    """List the files of a volume, a directory before what is in it."""
    query = {
        "prefix": spelled(os.fsencode(prefix)) or None,
        "recursive": "false" if shallow else None,
        "limit": limit,
    }
    found: list[dict[str, Any]] = connect(ctx).get(_path(volume), **query)
    if json:
        print_json(found)
        return
    rows = [
        (one["type"], one["mode"], one["size"], one["modified_at"], os.fsdecode(unspelled(one["path"])))
        for one in found
    ]
    print_table(("TYPE", "MODE", "SIZE", "MODIFIED", "PATH"), rows, empty="no files")
    if len(found) == limit:
        note(f"there may be more than these {limit}: see --limit, or give a longer PREFIX")


@app.command()
def get(
    ctx: typer.Context,
    volume: Volume,
    path: InVolume,
    target: Annotated[
        str | None,
        typer.Argument(metavar="[TARGET]", help="Local file or directory, `-` for the output; default: its name here."),
    ] = None,
) -> None:
    """Copy a file out of a volume; it takes its name here when it is whole."""
    server = connect(ctx)
    if target == STANDARD:
        with _reading(server, volume, path) as chunks:
            for chunk in chunks:
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        return
    to = Path(target or ".")
    if to.is_dir():
        name = local_name(os.fsencode(path).rstrip(b"/").rpartition(b"/")[2])
        if name is None:
            fail(f"{path}: not a name for a file here", status=USAGE)
        to = to / name
    size = 0
    with _reading(server, volume, path) as chunks:
        try:
            with written_whole(to, FILE_MODE) as file:
                for chunk in chunks:
                    file.write(chunk)
                    size += len(chunk)
        except OSError as error:
            fail(f"{to}: {error.strerror}")
    note(f"{to}, {human_size(size)}")


@app.command()
def put(
    ctx: typer.Context,
    volume: Volume,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A local file, or `-` for the input.")],
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="From the volume's top; into it where it ends in a slash.")
    ],
    keep: Annotated[bool, typer.Option("--keep", help="Refuse where there is such a file already.")] = False,
    json: Json = False,
) -> None:
    """Copy a local file into a volume, whole or not at all; missing directories are made."""
    if path.endswith("/"):
        if source == STANDARD:
            fail("what comes from the input has no name: give a PATH that does not end in a slash", status=USAGE)
        path += Path(source).resolve().name
    server = connect(ctx)
    try:
        if source == STANDARD:
            answer = _send(server, volume, path, _whatever_comes(sys.stdin.buffer), {}, keep=keep)
        else:
            with Path(source).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                answer = _send(
                    server, volume, path, announced_chunks(file, size), {"Content-Length": str(size)}, keep=keep
                )
    except OSError as error:
        fail(f"{source}: {error.strerror}")
    if json:
        print_json(answer)
    else:
        say(f"{answer['path']}, {human_size(answer['size'])}")


@app.command()
def rm(
    ctx: typer.Context,
    volume: Volume,
    path: InVolume,
    recursive: Annotated[bool, typer.Option("--recursive", help="A directory with all that is in it.")] = False,
    json: Json = False,
) -> None:
    """Delete a file of a volume."""
    query = {"path": spelled(os.fsencode(path)), "recursive": "true" if recursive else None}
    answer = connect(ctx).call("DELETE", _path(volume), query=query)
    if json:
        print_json(answer)
    else:
        say(f"deleted {path}")


@contextmanager
def _reading(server: Server, volume: str, path: str) -> Iterator[Iterator[bytes]]:
    query = {"path": spelled(os.fsencode(path))}
    with server.stream("GET", f"{_path(volume)}/content", params=query) as response:
        if response.status_code != 200:
            refused(response)
        yield response.iter_bytes(CHUNK_BYTES)


def _send(
    server: Server, volume: str, path: str, content: Iterator[bytes], headers: dict[str, str], *, keep: bool
) -> dict[str, Any]:
    query = {"path": spelled(os.fsencode(path)), **({"overwrite": "false"} if keep else {})}
    headers = {"Content-Type": "application/octet-stream", **headers}
    url = f"{_path(volume)}/content"
    with server.stream("PUT", url, params=query, content=content, headers=headers) as response:
        if response.is_error:
            refused(response)
        response.read()
        answer: dict[str, Any] = response.json()
        return answer


def _whatever_comes(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _path(volume: str) -> str:
    return f"/v1/volumes/{encode_segment(volume)}/files"
