"""`inn ssh`: the system's ssh, told where a VM is and which key its server has."""

from __future__ import annotations

import os
import shutil
from typing import Annotated
from urllib.parse import urlsplit

import typer

from innkeeper.cli.connection import Target, connect
from innkeeper.cli.printing import FAILED, USAGE, fail, say

# What ssh is told to know the server by, whatever address leads to it.
ALIAS = "innkeeper"
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, never listened on


def ssh(
    ctx: typer.Context,
    vm: Annotated[str | None, typer.Argument(metavar="VM", help="Id of a VM, vm_…", show_default=False)] = None,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[--] WORDS", help="More for ssh: options, a command.", show_default=False),
    ] = None,
    known_hosts: Annotated[
        bool, typer.Option("--known-hosts", help="Print the server's line for ~/.ssh/known_hosts, and do nothing else.")
    ] = False,
) -> None:
    """Log in to a VM by SSH, or run a command in it: the system's ssh with the server's port and host key.

    Your public key has to be the organization's: inn ssh-key add.
    """
    if known_hosts == (vm is not None):
        fail("name a VM, or ask for --known-hosts", status=USAGE)
    gateway = connect(ctx).get("/v1/ssh")
    if not gateway["enabled"]:
        fail("the server has no SSH gateway: set INNKEEPER_SSH_PORT", status=FAILED)
    target: Target = ctx.obj
    listens = str(gateway["address"])
    # On the server's own machine its address will do; from elsewhere it is the name that clients are told, or the API's.
    told = gateway["host"] if gateway["host"] != listens else None
    host = (told or urlsplit(target.url).hostname if target.url else None) or ANY_ADDRESS.get(listens, listens)
    port, key = int(gateway["port"]), str(gateway["host_key"])
    if known_hosts:
        say(f"{host if port == 22 else f'[{host}]:{port}'} {key}")
        return
    program = shutil.which("ssh")
    if program is None:
        fail("there is no ssh on this machine: install OpenSSH's client", status=FAILED)
    options = {
        "HostKeyAlias": ALIAS,
        "KnownHostsCommand": f"/bin/echo {ALIAS} {key}",
        "UserKnownHostsFile": "/dev/null",
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
    }
    argv = [program, "-p", str(port), *(f"-o{name}={value}" for name, value in options.items()), "-l", str(vm), host]
    # In our place: its terminal, signals and status are the caller's.
    os.execv(program, [*argv, *(words or [])])  # noqa: S606 - the program is the system's ssh
