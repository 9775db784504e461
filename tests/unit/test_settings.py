import re
from pathlib import Path

import pytest

from innkeeper.settings import ENV_PREFIX, NOT_SETTINGS, Settings, load_settings

RANGES = {
    "port": (1, 65_535),
    "room_wait_seconds": (0.001, 600),
    "default_command_timeout_seconds": (1, 3_600),
    "freeze_after_seconds": (0.05, 3_600),
    "memory_overcommit": (0.1, 16),
    "max_starts": (1, 64),
    "memory_reserve_mb": (0, None),
    "disk_reserve_mb": (0, None),
    "pool_disk_mb": (1_024, None),
    "max_execs": (1, None),
    "public_files_per_minute": (1, None),
}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)


def test_the_defaults_are_valid_and_safe():
    found = load_settings()
    assert (found.listen, found.port, found.insecure, found.master_key) == ("127.0.0.1", 7070, False, None)
    assert (found.host_dir, found.api_dir) == (found.home / "host", found.home / "api")


def test_the_environment_then_what_was_said(monkeypatch):
    monkeypatch.setenv("INNKEEPER_PORT", "8000")
    monkeypatch.setenv("INNKEEPER_HOME", "/x")
    found = load_settings(port=9_000, home=None)
    assert (found.port, found.home) == (9_000, Path("/x"))


@pytest.mark.parametrize("name", sorted(NOT_SETTINGS))
def test_variables_of_the_command_line_are_let_be(monkeypatch, name):
    monkeypatch.setenv(name, "x")
    load_settings()


def test_unknown_variables_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("INNKEEPER_PROT", "s3cret")
    monkeypatch.setenv("INNKEEPER_", "x")
    with pytest.raises(ValueError, match=r"^unknown setting: INNKEEPER_, INNKEEPER_PROT$"):
        load_settings()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="prot"):
        load_settings(prot=1)


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_each_range(monkeypatch, name):
    low, high = RANGES[name]
    for value in (low, high):
        if value is not None:
            monkeypatch.setenv(ENV_PREFIX + name.upper(), str(value))
            assert getattr(load_settings(), name) == value
    below = low - 1 if isinstance(low, int) else low - 0.05
    for value in (below, None if high is None else high + 1, "x", ""):
        if value is not None:
            monkeypatch.setenv(ENV_PREFIX + name.upper(), str(value))
            with pytest.raises(ValueError, match=re.escape(name)):
                load_settings()


@pytest.mark.parametrize(("name", "bad"), [("log_format", "xml"), ("log_level", "loud"), ("runsc_platform", "xen")])
def test_choices(monkeypatch, name, bad):
    monkeypatch.setenv(ENV_PREFIX + name.upper(), bad)
    with pytest.raises(ValueError, match=name):
        load_settings()


def test_every_number_has_a_test_of_its_range():
    bounded = {name for name, field in Settings.model_fields.items() if field.metadata and "ge=" in str(field.metadata)}
    assert bounded <= set(RANGES)


def test_the_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("INNKEEPER_MASTER_KEY", "hunter2")
    assert "hunter2" not in repr(load_settings())


def test_a_server_is_named_after_its_directory(tmp_path, monkeypatch):
    one = load_settings(home=tmp_path / "a").server_id
    assert re.fullmatch("[0-9a-f]{8}", one)
    assert one != load_settings(home=tmp_path / "b").server_id
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    for same in ("a", "link", "./x/../a", tmp_path / "a"):
        assert load_settings(home=same).server_id == one
    assert load_settings(home="/var/lib/innkeeper").server_id == "37d43680"
