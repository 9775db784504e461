"""`inn diagnose`: a look into the server's own processes while they run."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from innkeeper.cli.connection import Server, connect
from innkeeper.cli.options import Json
from innkeeper.cli.printing import human_size, note, print_json, print_table, say, visible_lines

app = typer.Typer(
    help="Look into the server's own processes: time, tasks, memory, log level. For the operator alone.",
    no_args_is_help=True,
)

Host = Annotated[
    str | None,
    typer.Option(metavar="HOST", help="Name or id of a host: its daemon.", show_default="the API process"),
]
Seconds = Annotated[float, typer.Option(min=0.1, max=60, help="How long to look.")]


class Format(StrEnum):
    """How stacks are printed."""

    folded = "folded"
    speedscope = "speedscope"


@app.command()
def stacks(
    ctx: typer.Context,
    host: Host = None,
    seconds: Seconds = 5,
    form: Annotated[
        Format, typer.Option("--format", help="For flame graphs: a line per stack, or a file for speedscope.")
    ] = Format.folded,
) -> None:
    """Sample what the process's threads do, 100 times a second, and print the stacks."""
    found = _ask(connect(ctx), "stacks", host, seconds)
    note(f"{found['samples']} samples in {found['seconds']} s")
    if form is Format.speedscope:
        print_json(speedscope(found["stacks"], name=host or "api"))
        return
    for stack, count in sorted(found["stacks"].items(), key=lambda item: -item[1]):
        say(f"{stack} {count}")


@app.command()
def tasks(ctx: typer.Context, host: Host = None, json: Json = False) -> None:
    """Print what the process's tasks wait for, equal ones together."""
    found = _ask(connect(ctx), "tasks", host, 0)["tasks"]
    if json:
        print_json(found)
        return
    for task in found:
        say(f"{task['count']} x {task['name'] or 'task'}")
        for line in task["stack"]:
            say(f"    {line}")


@app.command()
def memory(ctx: typer.Context, host: Host = None, seconds: Seconds = 5, json: Json = False) -> None:
    """Trace allocations for a while and print what is still held, beside the size of the process. Slows it down meanwhile."""
    found = _ask(connect(ctx), "memory", host, seconds)
    if json:
        print_json(found)
        return
    say(f"resident {human_size(found['resident_kib'] * 1024)}, at most {human_size(found['peak_kib'] * 1024)}")
    say(f"allocated in {found['seconds']} s and still held:")
    rows = [(one["where"], human_size(one["bytes"]), one["blocks"]) for one in found["allocated"]]
    print_table(("WHERE", "SIZE", "BLOCKS"), rows)
    print_table(("TYPE", "OBJECTS"), [(one["type"], one["count"]) for one in found["objects"]])


@app.command()
def guest(
    ctx: typer.Context,
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="Id of an instance: see inn room show.")],
) -> None:
    """Print where the goroutines of the agent in a guest are, as the guest says."""
    found = connect(ctx).call("POST", "/v1/diagnosis", {"kind": "guest", "instance_id": instance})
    print(visible_lines(found["text"]))


@app.command("level")
def log_level(
    ctx: typer.Context,
    level: Annotated[
        str | None,
        typer.Argument(metavar="[LEVEL]", help="debug, info, warning or error; without it the present one is shown."),
    ] = None,
    json: Json = False,
) -> None:
    """Show from which level on the processes log, or change it until they end."""
    server = connect(ctx)
    method, body = ("GET", None) if level is None else ("PUT", {"level": level})
    found = server.call(method, "/v1/log-level", body)
    if json:
        print_json(found)
    else:
        print_table(("PROCESS", "HOST", "LEVEL"), [(one["process"], one["host_id"], one["level"]) for one in found])


def _ask(server: Server, kind: str, host: str | None, seconds: float) -> dict[str, Any]:
    host_id = None if host is None else server.host(host)["id"]
    found: dict[str, Any] = server.call("POST", "/v1/diagnosis", {"kind": kind, "seconds": seconds, "host_id": host_id})
    return found


def speedscope(stacks: dict[str, int], *, name: str) -> dict[str, Any]:
    """Folded stacks as a file for https://www.speedscope.app, one profile per thread."""
    frames: dict[str, int] = {}
    threads: dict[str, tuple[list[list[int]], list[int]]] = {}
    for stack, count in stacks.items():
        thread, *functions = stack.split(";")
        samples, weights = threads.setdefault(thread, ([], []))
        samples.append([frames.setdefault(function, len(frames)) for function in functions])
        weights.append(count)
    return {
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "name": name,
        "shared": {"frames": [{"name": function} for function in frames]},
        "profiles": [
            {
                "type": "sampled",
                "name": thread,
                "unit": "none",
                "startValue": 0,
                "endValue": sum(weights),
                "samples": samples,
                "weights": weights,
            }
            for thread, (samples, weights) in threads.items()
        ],
    }
