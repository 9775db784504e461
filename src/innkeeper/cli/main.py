"""The `inn` command. Commands import what they need when they run, so that `inn --help` answers at once."""

from __future__ import annotations

import typer

from innkeeper.cli import doctor, version

app = typer.Typer(
    name="inn",
    help="Isolated guest computers for AI agents, on your own Linux machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(doctor.doctor)
app.command()(version.version)


def main() -> None:
    """The entry point of the `inn` script."""
    app()
