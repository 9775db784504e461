"""The `inn` command in this process, against a scripted server on a unix socket."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripted_server", Path(__file__).with_name("scripted_server.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scripted_server"] = module
    spec.loader.exec_module(module)
    return module


scripted_server = _load()


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


Inn = Callable[..., Ended]


@pytest.fixture(scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    home = tmp_path_factory.mktemp("home")
    (home / "api").mkdir()
    app = scripted_server.ScriptedServer(home / "api" / "inn.sock")
    with scripted_server.serving(app, uds=str(app.socket)):
        yield app


@pytest.fixture
def server(_running):
    """The running server, as new."""
    _running.__init__(_running.socket)
    return _running


@pytest.fixture
def inn(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, request) -> Inn:
    """Run the command line: `inn("room", "list")`. It knows the scripted server when the test uses it."""
    from innkeeper.cli.main import main

    for name in ("INNKEEPER_URL", "INNKEEPER_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    home = (
        request.getfixturevalue("server").socket.parent.parent
        if "server" in request.fixturenames
        else tmp_path / "none"
    )
    monkeypatch.setenv("INNKEEPER_HOME", str(home))

    def run(*argv: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["inn", *argv])
        status: object = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        sys.stdout.flush()
        captured = capfd.readouterr()
        return Ended(status if isinstance(status, int) else 0 if status is None else 1, captured.out, captured.err)

    return run
