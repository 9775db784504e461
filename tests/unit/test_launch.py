"""What of the launcher runs without a server: how it says no, and what the API process is given."""

import base64
import os
import pwd
from types import SimpleNamespace

import pytest

from innkeeper import api_process, launch
from innkeeper.api_process import CannotStartError, _account, _api_argv, _api_environment, _known_database
from innkeeper.settings import Settings
from innkeeper.settings_sources import ENV_PREFIX, load_settings, settings_with_origin


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "configure_logging", lambda **_: None)


def test_the_leaves_of_a_group_in_their_order():
    first, second, third = CannotStartError("1"), CannotStartError("2"), CannotStartError("3")
    group = BaseExceptionGroup("g", [first, BaseExceptionGroup("h", [second, BaseExceptionGroup("i", [third])])])
    assert list(launch._leaves(group)) == [first, second, third]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_refusal_is_one_line_with_its_fix_and_status_1(monkeypatch, capsys, grouped):
    async def refuse(settings, level):
        error = CannotStartError("no runsc\nFIX: apt-get install runsc")
        raise BaseExceptionGroup("g", [ExceptionGroup("h", [error])]) if grouped else error

    monkeypatch.setattr(launch, "_serve", refuse)
    with pytest.raises(SystemExit) as caught:
        launch.serve(Settings())
    assert (caught.value.code, capsys.readouterr().err) == (1, "inn: no runsc\nFIX: apt-get install runsc\n")


def test_another_failure_is_not_swallowed(monkeypatch):
    async def crash(settings, level):
        raise ExceptionGroup("g", [CannotStartError("x"), KeyError("bug")])

    monkeypatch.setattr(launch, "_serve", crash)
    with pytest.raises(ExceptionGroup) as caught:
        launch.serve(Settings())
    assert caught.value.subgroup(KeyError) is not None


def test_only_root_may_serve(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(launch.os, "geteuid", lambda: 1_000)
    with pytest.raises(SystemExit):
        launch.serve(Settings(home=tmp_path / "home"))
    assert "needs root" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_one_server_a_directory(tmp_path):
    settings = Settings(home=tmp_path)
    settings.host_dir.mkdir()
    with (
        launch._only_server(settings),
        pytest.raises(CannotStartError, match="another server runs on"),
        launch._only_server(settings),
    ):
        pass
    with launch._only_server(settings):
        pass


def test_parts_that_are_missing_are_named_with_their_fix(monkeypatch):
    monkeypatch.setattr(launch, "shipped", SimpleNamespace(agent_binary=lambda _: None, recipes=lambda _: None))
    for find in (launch._agent_binary, launch._recipes):
        with pytest.raises(CannotStartError, match="FIX: "):
            find(Settings())


def test_no_secret_is_in_the_command_line_and_one_in_the_environment(monkeypatch):
    key = base64.b64encode(b"hunter2 " * 4).decode()
    for name in ("INNKEEPER_MASTER_KEY", "INNKEEPER_TOKEN", "AWS_SECRET", "HOME_SECRET"):
        monkeypatch.setenv(name, key)
    settings = load_settings()
    assert key not in " ".join(_api_argv(settings, "user", 5, 6))
    found = _api_environment(settings)
    assert [name for name, value in found.items() if key in value] == ["INNKEEPER_MASTER_KEY"]


def test_the_api_gets_the_settings_as_they_were_decided(monkeypatch):
    monkeypatch.setenv("INNKEEPER_PORT", "8000")
    monkeypatch.setenv("INNKEEPER_ROOM_WAIT_SECONDS", "7")
    monkeypatch.setenv("PATH", "/evil")
    found = _api_environment(load_settings(port=9_000, listen="::1", insecure=True))
    assert found["PATH"] == "/usr/bin:/bin"
    assert found["INNKEEPER_HOME"] == "/mnt"
    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    inside = load_settings()
    assert (inside.port, inside.listen, inside.insecure, inside.room_wait_seconds) == (9_000, "::1", True, 7)


def test_the_api_gets_what_the_settings_file_said_without_the_file(monkeypatch, tmp_path):
    file = tmp_path / "innkeeper.toml"
    file.write_text('room_wait_seconds = 7\nlog_format = "json"\nkeep_machines = false\n')
    found = _api_environment(settings_with_origin(file).settings)
    assert (found["INNKEEPER_ROOM_WAIT_SECONDS"], found["INNKEEPER_LOG_FORMAT"]) == ("7.0", "json")
    assert (found["INNKEEPER_KEEP_MACHINES"], found.get("INNKEEPER_CONFIG")) == ("false", None)


def test_the_command_line_drops_everything_before_python(tmp_path):
    settings = Settings(home=tmp_path)
    argv = _api_argv(settings, "innkeeper", 5, 6)
    assert argv[:6] == ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    assert argv[-6:] == ["/mnt/venv/bin/python", "-m", "innkeeper.launch_api", "5", "6", ""]
    assert argv[-7] == "innkeeper"
    last = api_process.ENTER.strip().splitlines()[-1]
    for flag in ("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--clear-groups", '--reuid "$user"'):
        assert flag in last
    settings.host_dir.mkdir()
    (settings.host_dir / "server-uuid").write_text("abc\n")
    assert _known_database(settings) == "abc"
    assert _api_argv(settings, "innkeeper", 5, 6)[-1] == "abc"


def test_the_user_of_the_api():
    mine = pwd.getpwuid(os.getuid()).pw_name
    assert _account(Settings(api_user=mine)).pw_uid == os.getuid()
    with pytest.raises(CannotStartError, match=r"FIX: useradd .* nobody-such"):
        _account(Settings(api_user="nobody-such"))
