import base64
import re
from pathlib import Path

import pytest

from innkeeper import settings_file
from innkeeper.settings import Settings
from innkeeper.settings_file import find_settings_file, home_of
from innkeeper.settings_sources import (
    ENV_PREFIX,
    NOT_SETTINGS,
    SettingsError,
    load_settings,
    settings_with_origin,
    shown,
)

KEY = base64.b64encode(b"hunter2 " * 4).decode()

RANGES = {
    "port_connections": (1, 512),
    "ssh_port": (0, 65_535),
    "ssh_connections": (1, 4_096),
    "ssh_connections_per_address": (1, 4_096),
    "ssh_login_seconds": (0.001, 600),
    "share_answer_seconds": (0.001, 3600),
    "share_idle_seconds": (0.001, 86_400),
    "vm_vcpus": (1, 64),
    "vm_memory_mb": (128, None),
    "vm_disk_mb": (256, None),
    "vm_lifetime_seconds": (20, None),
    "vm_max_lifetime_seconds": (20, None),
    "vm_pool_size": (0, 1_000),
    "build_vcpus": (1, 64),
    "build_memory_mb": (128, None),
    "build_disk_mb": (256, None),
    "build_timeout_seconds": (1, 86_400),
    "build_context_mb": (1, None),
    "build_cache_mb": (0, None),
    "image_max_mb": (1, None),
    "max_builds": (1, 64),
    "port": (1, 65_535),
    "room_wait_seconds": (0.001, 600),
    "default_command_timeout_seconds": (1, 3_600),
    "freeze_after_seconds": (0.05, 3_600),
    "memory_overcommit": (0.1, 16),
    "max_starts": (1, 64),
    "memory_reserve_mb": (0, None),
    "disk_reserve_mb": (0, None),
    "pool_disk_mb": (1_024, None),
    "image_quota_mb": (0, None),
    "import_max_mb": (64, 65_536),
    "import_max_files": (1, 10_000_000),
    "import_timeout_seconds": (1, 86_400),
    "max_execs": (1, None),
    "max_snapshots": (0, None),
    "snapshot_verify_hours": (0, 8_760),
    "max_volumes": (0, None),
    "max_volume_mb": (64, 1_048_576),
    "max_terminals": (1, 256),
    "audit_retention_days": (1, 36_500),
    "price_cpu_hour": (0, 1_000_000),
    "price_memory_gib_hour": (0, 1_000_000),
    "execution_retention_days": (1, 36_500),
    "log_retention_days": (1, 36_500),
    "instance_log_mb": (1, 10_240),
    "public_files_per_minute": (1, None),
    "stop_seconds": (0, 3_600),
    "max_connections": (16, None),
    "max_requests_per_organization": (1, None),
    "log_file_mb": (0, 10_240),
    "log_files_kept": (1, 1_000),
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
    with pytest.raises(ValueError, match="unknown") as caught:
        load_settings()
    assert caught.value.problems == (
        "unknown setting: INNKEEPER_",
        "unknown setting: INNKEEPER_PROT; did you mean INNKEEPER_PORT?",
    )
    monkeypatch.undo()
    with pytest.raises(SettingsError, match="prot; did you mean port"):
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
            with pytest.raises(ValueError, match=f"^{ENV_PREFIX}{name.upper()}: must be "):
                load_settings()


@pytest.mark.parametrize(("name", "bad"), [("log_format", "xml"), ("log_level", "loud"), ("runsc_platform", "xen")])
def test_choices(monkeypatch, name, bad):
    monkeypatch.setenv(ENV_PREFIX + name.upper(), bad)
    with pytest.raises(SettingsError, match=f"{ENV_PREFIX}{name.upper()}: must be one of `.*`, `") as caught:
        load_settings()
    assert bad not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "share_domain",
            ["localhost", "share.example.com", "s.example.com:8443"],
            ["", ".x", "UP.example", "a b", "x:", "x:0", "http://x"],
        ),
        ("listen", ("::1", "localhost", "127.0.0.9"), ("example", "", "0.0.0.0", "1.2.3")),
        ("ssh_host", ("vms.example.com", "192.0.2.1", "::1"), ("", "a:22", "UP.example", "a b", "[::1]")),
        ("allowed_cidrs", ("", "10.1.0.0/16, 192.168.0.1"), ("10.1.0.1/16", "fe80::/10", "a")),
        ("dns_upstreams", ("", "1.2.3.4,1.2.3.4:54,::1,[::1]:54"), ("dns.example", "1.2.3.4:0", "[::1]:x", "1.2.3.4:")),
        ("images", ("", "base,python-3.13"), ("../x", "Base", "a b")),
        ("master_key", (KEY,), ("", "bm90IDMyIGJ5dGVz", "!" + KEY[1:])),
        (
            "default_registry",
            ("", "localhost", "registry.example.com", "registry:5000", "192.0.2.1"),
            ("registry", "https://registry.example.com", "registry.example.com/team", "UP.example", "a b.c", "x.y:0"),
        ),
        ("insecure", ("true", "0"), ("perhaps", "")),
        ("vm_image_variants", ("", "standard=base, nix-dev=my/image:1"), ("standard", "=base", "a=", "A=base")),
    ],
)
def test_what_a_text_may_be(monkeypatch, name, good, bad):
    for value in good:
        monkeypatch.setenv(ENV_PREFIX + name.upper(), value)
        load_settings()
    for value in bad:
        monkeypatch.setenv(ENV_PREFIX + name.upper(), value)
        with pytest.raises(SettingsError, match=f"^{ENV_PREFIX}{name.upper()}: must be "):
            load_settings()


def test_plain_http_on_other_addresses_must_be_said_aloud(monkeypatch):
    monkeypatch.setenv("INNKEEPER_LISTEN", "0.0.0.0")
    with pytest.raises(SettingsError, match=r"^INNKEEPER_LISTEN: must be a loopback address.*--insecure"):
        load_settings()
    assert load_settings(insecure=True).listen == "0.0.0.0"


def test_every_number_has_a_test_of_its_range():
    bounded = {name for name, field in Settings.model_fields.items() if field.metadata and "ge=" in str(field.metadata)}
    assert bounded <= set(RANGES)


def test_the_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("INNKEEPER_MASTER_KEY", KEY)
    found = load_settings()
    assert KEY not in repr(found) and shown(found.master_key) == "(hidden)"
    monkeypatch.setenv("INNKEEPER_MASTER_KEY", "hunter2")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "hunter2" not in repr(caught.value) + str(caught.value)
    with pytest.raises(ValueError, match="32-byte") as direct:
        Settings(master_key="hunter2")
    assert "hunter2" not in str(direct.value)
    assert shown("postgresql://me:hunter2@db/inn") == "postgresql://me:(hidden)@db/inn"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "innkeeper.toml"


def test_the_file_then_the_environment_then_what_was_said(monkeypatch, file):
    file.write_text(
        'port = 1\nlog_level = "debug"\nlog_format = "json"\nallowed_cidrs = ["10.0.0.0/8", "10.1.0.0/16"]\n'
    )
    monkeypatch.setenv("INNKEEPER_PORT", "2")
    monkeypatch.setenv("INNKEEPER_LOG_LEVEL", "error")
    origin = settings_with_origin(file, port=3, home=None)
    found = origin.settings
    assert (found.port, found.log_level, found.log_format) == (3, "error", "json")
    assert found.allowed_cidrs == "10.0.0.0/8,10.1.0.0/16"
    assert origin.sources == {
        "port": "option",
        "log_level": "environment",
        "log_format": str(file),
        "allowed_cidrs": str(file),
    }


def test_everything_that_is_wrong_is_named_at_once(monkeypatch, file):
    file.write_text('prot = 1\nINNKEEPER_HOME = "/x"\nmax_starts = 0\n[log]\nlevel = 1\n')
    monkeypatch.setenv("INNKEEPER_PORT", "none")
    monkeypatch.setenv("INNKEEPER_LOG_LEVLE", "info")
    with pytest.raises(SettingsError) as caught:
        settings_with_origin(file)
    assert caught.value.problems == (
        f"{file}: unknown setting: prot; did you mean port?",
        f"{file}: unknown setting: INNKEEPER_HOME; did you mean home?",
        f"{file}: unknown setting: log",
        "unknown setting: INNKEEPER_LOG_LEVLE; did you mean INNKEEPER_LOG_LEVEL?",
        "INNKEEPER_PORT: must be a whole number from 1 to 65535",
        f"max_starts ({file}): must be a whole number from 1 to 64",
    )


@pytest.mark.parametrize("content", [b"port = ", b"\xff", None])
def test_a_file_that_cannot_be_read_is_named(file, content):
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        settings_with_origin(file)


def test_a_key_is_not_taken_from_a_file_that_others_may_read(file):
    file.write_text(f'master_key = "{KEY}"\n')
    file.chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        settings_with_origin(file)
    file.chmod(0o600)
    assert settings_with_origin(file).settings.master_key.get_secret_value() == KEY


def test_which_file_is_read(monkeypatch, file, tmp_path):
    monkeypatch.setattr(settings_file, "DEFAULT_PATH", file)
    assert find_settings_file(None, {}) is None and home_of(None) == settings_file.DEFAULT_HOME
    file.write_text('home = "/srv/inn"\n')
    assert find_settings_file(None, {}) == file and home_of(None) == Path("/srv/inn")
    assert find_settings_file(None, {"INNKEEPER_CONFIG": ""}) is None
    assert find_settings_file(None, {"INNKEEPER_CONFIG": "/x"}) == Path("/x")
    assert find_settings_file(tmp_path / "y", {"INNKEEPER_CONFIG": "/x"}) == tmp_path / "y"


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
