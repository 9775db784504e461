"""`inn image`: what rooms can start from."""

from __future__ import annotations

from typing import Any

import typer

from innkeeper.cli.connection import connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import human_size, print_json, print_table

app = typer.Typer(help="Images that rooms start from.", no_args_is_help=True)


@app.callback()
def image() -> None:
    """Images that rooms start from."""


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> None:
    """List the images and how far they are."""
    images: list[dict[str, Any]] = connect(ctx).get("/v1/images")
    if json:
        print_json(images)
        return
    rows = [
        (
            one["name"],
            one["status"],
            human_size(one["size_bytes"]),
            one["user"],
            one["built_at"],
            one["digest"][:19] or None,
            one["message"],
        )
        for one in images
    ]
    print_table(("NAME", "STATUS", "SIZE", "USER", "BUILT", "DIGEST", "MESSAGE"), rows, empty="no images")
