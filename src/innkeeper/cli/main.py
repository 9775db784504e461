"""The `inn` command. Commands import what they need when they run, and only the asked one is built: `inn` answers at once."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from innkeeper.cli.connection import Target
from innkeeper.cli.version import version

# name -> (module, attribute): an `app` is a group of commands, anything else a command.
COMMANDS = {
    "serve": ("serve", "serve"),
    "end-guests": ("serve", "end_guests"),
    "doctor": ("doctor", "doctor"),
    "room": ("room", "app"),
    "vm": ("vm", "app"),
    "snapshot": ("snapshot", "app"),
    "volume": ("volume", "app"),
    "retention": ("retention", "app"),
    "exec": ("execution", "exec_"),
    "py": ("execution", "py"),
    "run": ("run", "run"),
    "terminal": ("terminal", "terminal"),
    "logs": ("logs", "logs"),
    "ssh": ("ssh", "ssh"),
    "ssh-key": ("ssh_key", "app"),
    "cp": ("copying", "cp"),
    "ls": ("looking", "ls"),
    "cat": ("looking", "cat"),
    "share": ("share", "app"),
    "profile": ("profile", "app"),
    "image": ("image", "app"),
    "agent": ("agent", "app"),
    "registry": ("registry", "app"),
    "kernel": ("kernel", "app"),
    "organization": ("organization", "app"),
    "token": ("token", "app"),
    "host": ("host", "app"),
    "capacity": ("capacity", "capacity"),
    "drain": ("drain", "app"),
    "gc": ("gc", "gc"),
    "df": ("df", "df"),
    "settings": ("settings", "settings"),
    "diagnose": ("diagnose", "app"),
    "backup": ("backup", "backup"),
    "restore": ("backup", "restore"),
    "audit": ("audit", "audit"),
    "version": ("version", "version"),
}
HELP = """Isolated guest computers for AI agents, on your own Linux machines.

Commands speak to the server over the unix socket in its state directory, or to INNKEEPER_URL with the token in INNKEEPER_TOKEN.
"""


def build(names: tuple[str, ...] = tuple(COMMANDS)) -> typer.Typer:
    """The application with the named commands."""
    app = typer.Typer(
        name="inn", help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
    )
    app.callback()(_options)
    for name in names:
        module, attribute = COMMANDS[name]
        found = getattr(importlib.import_module(f"innkeeper.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def _options(
    ctx: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(
            envvar="INNKEEPER_HOME",
            help="State directory of the server, whose socket is used.",
            show_default="the settings file's, else /var/lib/innkeeper",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(envvar="INNKEEPER_URL", help="Address of a server, in place of the socket.", show_default=False),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token, in place of INNKEEPER_TOKEN.", show_default=False)
    ] = None,
) -> None:
    ctx.obj = Target(home, url, token_file)


def asked(argv: list[str]) -> tuple[str, ...]:
    """The commands that a command line can mean: the one it names, or all where it names none."""
    if any(name.endswith("_COMPLETE") for name in os.environ):
        return tuple(COMMANDS)
    first = next((word for word in argv if word in COMMANDS), None)
    before = argv[: argv.index(first)] if first is not None else argv
    if first is None or "--help" in before or "--show-completion" in before or "--install-completion" in before:
        return tuple(COMMANDS)
    # The first word that is a command may still be the value of an option in front of the real one: then build all.
    return tuple(COMMANDS) if before and before[-1].startswith("-") else (first,)


def main() -> None:
    """The entry point of the `inn` script."""
    if sys.argv[1:] == ["version"]:
        # Half of its time would go into building options that it does not have.
        version()
        return
    try:
        build(asked(sys.argv[1:]))()
    except BrokenPipeError:
        # The reader of our output went away (`inn ... | head`); without this the interpreter complains once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
