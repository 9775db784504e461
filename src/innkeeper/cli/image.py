"""`inn image`: what rooms can start from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from innkeeper.cli import image_build
from innkeeper.cli.connection import connect, encode_segment
from innkeeper.cli.image_import import import_
from innkeeper.cli.options import Json
from innkeeper.cli.printing import human_size, print_fields, print_json, print_table, say
from innkeeper.cli.shipped_image import build_shipped

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the image, with its tag where it has one.")]

app = typer.Typer(help="Images that rooms start from.", no_args_is_help=True)
app.command("build-shipped")(build_shipped)
app.command()(image_build.build)
app.command()(image_build.builds)
app.command()(image_build.log)
app.command()(image_build.cancel)


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
            one["source"],
            one["user"],
            one["updated_at"][:19],
            one["digest"][:12] or None,
            one["last_error"],
        )
        for one in images
    ]
    print_table(
        ("NAME", "STATUS", "SIZE", "SOURCE", "USER", "UPDATED", "DIGEST", "LAST ERROR"), rows, empty="no images"
    )


@app.command()
def show(ctx: typer.Context, name: Name, json: Json = False) -> None:
    """Show an image: what it was made of, and what its rooms begin with."""
    image: dict[str, Any] = connect(ctx).get(f"/v1/images/{encode_segment(name)}")
    if json:
        print_json(image)
        return
    print_fields((field, _plain(value)) for field, value in image.items())


@app.command()
def rm(ctx: typer.Context, name: Name) -> None:
    """Remove an image. Refused while a profile, an instance or a build uses it."""
    connect(ctx).call("DELETE", f"/v1/images/{encode_segment(name)}")


@app.command()
def gc(
    ctx: typer.Context,
    build_cache: Annotated[bool, typer.Option("--build-cache", help="Remove all kept steps of builds too.")] = False,
    json: Json = False,
) -> None:
    """Remove the files of images that nobody has and nothing uses any more. For the operator alone."""
    done: dict[str, Any] = connect(ctx).call("POST", "/v1/image-gc", {"build_cache": build_cache})
    if json:
        print_json(done)
        return
    say(
        f"removed {len(done['digests'])} files and {done['build_steps']} build steps, {human_size(done['freed_bytes'])}; "
        f"{human_size(done['build_cache_bytes'])} of build steps are kept"
    )


def _plain(value: object) -> object:
    """Objects as `name=value` words, lists as words."""
    if isinstance(value, dict):
        return " ".join(f"{name}={text}" for name, text in value.items()) or None
    if isinstance(value, list):
        return " ".join(map(str, value)) or None
    return value if value != "" else None


app.command("import")(import_)
