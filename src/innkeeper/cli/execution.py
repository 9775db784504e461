"""`inn exec` and `inn py`: programs and Python in VMs. What runs is followed as it comes; Ctrl-C goes to it."""

from __future__ import annotations

import codeop
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from innkeeper.cli.connection import connect, encode_segment, refused
from innkeeper.cli.options import Json
from innkeeper.cli.printing import USAGE, fail, note, print_json
from innkeeper.cli.profile import parse_env
from innkeeper.cli.program import (
    INTERRUPTED,
    SILENCE_SECONDS,
    Cwd,
    Env,
    Line,
    Outputs,
    Raw,
    Stdin,
    numbered_events,
    read_stdin,
    stdin_is_input,
)

if TYPE_CHECKING:
    from innkeeper.cli.connection import Server

Timeout = Annotated[int, typer.Option(metavar="SECONDS", help="How long it may take.")]


def exec_(
    ctx: typer.Context,
    vm: Annotated[str, typer.Argument(metavar="VM", help="Id of a VM, vm_…")],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Program and arguments.", show_default=False)
    ] = None,
    line: Line = None,
    timeout: Timeout = 60,
    user: Annotated[str | None, typer.Option(help="User in the guest; default: the VM's.")] = None,
    cwd: Cwd = None,
    env: Env = None,
    stdin: Stdin = None,
    background: Annotated[bool, typer.Option("--background", help="Print its id and leave it to itself.")] = False,
    raw: Raw = False,
    json: Json = False,
) -> None:
    """Run a program in a VM, without a shell in between. The exit status is the program's."""
    if bool(command) == (line is not None):
        fail("give either a program after -- or a shell line with -c", status=USAGE)
    body: dict[str, Any] = {"timeout": timeout, **({"argv": command} if command else {"command": line})}
    body |= {name: value for name, value in (("user", user), ("cwd", cwd)) if value is not None}
    if env:
        body["env"] = parse_env(env)
    if stdin if stdin is not None else stdin_is_input():
        body["stdin"] = read_stdin()
    server = connect(ctx)
    path = f"/v1/vms/{encode_segment(vm)}/exec"
    if json and not background:
        answer = server.call("POST", path, body)
        print_json(answer)
        raise SystemExit(answer["exit_code"] & 0xFF)
    begun = server.call("POST", path, {**body, "background": True})
    if background:
        print_json(begun) if json else print(begun["execution_id"])
        return
    raise SystemExit(_Follower(server, begun["execution_id"], raw=raw).exit_status())


def py(
    ctx: typer.Context,
    vm: Annotated[str | None, typer.Argument(metavar="[VM]", help="Id of a VM, vm_…", show_default=False)] = None,
    session: Annotated[str | None, typer.Option(metavar="ID", help="A session instead of a VM.")] = None,
    code: Annotated[str | None, typer.Option("--command", "-c", metavar="CODE", help="Python to run.")] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with the Python to run.")] = None,
    timeout: Timeout = 600,
    raw: Raw = False,
) -> None:
    """Python in the interpreter of a VM's session, which keeps its state: one piece (-c, --file or standard input), or a prompt."""
    if (vm is None) == (session is None):
        fail("give either a VM or --session", status=USAGE)
    if code is not None and file is not None:
        fail("give either --file or -c", status=USAGE)
    where = {"session_id": session} if vm is None else {"vm_id": vm}
    server = connect(ctx)

    def run(text: str) -> int:
        begun = server.call("POST", "/execute_async", {**where, "code": text, "timeout": timeout})
        return _Follower(server, begun["execution_id"], raw=raw).exit_status()

    if code is None and file is None and sys.stdin.isatty():
        _prompt(run)
        return
    raise SystemExit(run(code if code is not None else _source(file)))


def _source(file: Path | None) -> str:
    if file is None:
        return read_stdin()
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {file}: {error}", status=USAGE)


def _prompt(run: Callable[[str], int]) -> None:
    """Ask for one piece after the other, until the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing

    lines: list[str] = []
    while True:
        try:
            lines.append(input("... " if lines else ">>> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            lines = []
            continue
        text = "\n".join(lines)
        if not text.strip():
            lines = []
        elif _complete(text):
            lines = []
            run(text)


def _complete(text: str) -> bool:
    """Whether it is a whole piece; what this Python takes for an error the guest's may know better."""
    try:
        return codeop.compile_command(text, symbol="single") is not None
    except (SyntaxError, ValueError, OverflowError):
        return True


class _Follower:
    """Writes an execution's outputs as they come."""

    def __init__(self, server: Server, execution: str, *, raw: bool) -> None:
        self._server = server
        self._execution = execution
        self._seen = "0"
        self._outputs = Outputs(raw=raw)
        self._writing = False
        self._interrupted = False

    def exit_status(self) -> int:
        """What the program ended with. The first Ctrl-C interrupts it, the second leaves it alone."""
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            return self._followed()
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, number: int, frame: object) -> None:
        """Ctrl-C, but not before it is noted that a piece was written: it would come again. A second one at once: writing may be what takes so long."""
        if self._writing and not self._interrupted:
            self._interrupted = True
        else:
            raise KeyboardInterrupt

    def _followed(self) -> int:
        interrupted = False
        while True:
            try:
                result = self._read()
            except KeyboardInterrupt:
                if interrupted:
                    note(f"inn: stopped reading; it goes on as execution {self._execution}")
                    raise SystemExit(INTERRUPTED) from None
                interrupted = True
                self._server.call("POST", f"/v1/executions/{self._execution}/signal", {"signal": "INT"})
                continue
            if result["exit_code"] is None:
                fail(result["error"])
            if result["timed_out"]:
                note("inn: it was stopped at its time limit (--timeout)")
            if result["kernel"] and result["kernel"]["lost"]:
                note("inn: the interpreter ended, and what it held is gone")
            return int(result["exit_code"]) & 0xFF

    def _read(self) -> dict[str, Any]:
        """The result. What was seen before a Ctrl-C is not written twice."""
        import httpx2

        request = {
            "headers": {"Accept": "text/event-stream", "Last-Event-ID": self._seen},
            "timeout": httpx2.Timeout(SILENCE_SECONDS, connect=5.0),
        }
        with self._server.stream("GET", f"/v1/executions/{self._execution}/stream", **request) as response:
            if response.is_error:
                refused(response)
            for number, event, data in numbered_events(response):
                if event == "output":
                    self._writing = True
                    self._outputs.write(data["data"], data["stream"])
                elif event == "gap":
                    note(f"inn: {data['to'] - data['from']} bytes of output are not kept")
                elif event == "error":
                    fail(data["detail"])
                elif event == "result":
                    self._outputs.end()
                    return data
                self._seen = self._seen if number is None else number
                self._writing = False
                if self._interrupted:
                    self._interrupted = False
                    raise KeyboardInterrupt
        fail(f"the server ended the stream without a result (execution {self._execution})")
