import json
import logging

import pytest
import structlog

from innkeeper.core.token import Dialect, render_token
from innkeeper.log_setup import LogFile, configure_logging, log_file, redact
from innkeeper.settings import Settings

TOKENS = [render_token(dialect) for dialect in Dialect] + [render_token(Dialect.GENTILITY, test=True)]


def deep(value, depth):
    for _ in range(depth):
        value = {"x": [value]}
    return value


class Thing:
    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return f"<Thing {self.text}>"


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token[:8])
@pytest.mark.parametrize(
    "place",
    [
        lambda token: {"event": f"got {token}"},
        lambda token: {"event": f"%20{token}\n"},
        lambda token: {"url": f"http://x.test/?t={token}&y"},
        lambda token: {"headers": [("x-thing", f"Bearer {token}")]},
        lambda token: {"headers": ((b"x-thing", token.encode()),)},
        lambda token: {"request": {"query": {"a": [1, {"b": token}]}}},
        lambda token: {"request": {token: 1}},
        lambda token: {"seen": {token}},
        lambda token: {"error": ValueError(token)},
        lambda token: {"thing": Thing(token)},
        lambda token: {"exception": f"Traceback\n  {token}"},
        lambda token: deep(token, 3),
        lambda token: deep(token, 50),
        lambda token: deep(token, 5_000),
    ],
)
def test_a_token_is_shown_nowhere(token, place):
    said = str(redact(None, "info", place(token)))
    assert token not in said
    assert token[-20:] not in said


@pytest.mark.parametrize(
    "event",
    [
        {"Authorization": "hunter2"},
        {"env": {"A": "hunter2"}},
        {"request": {"headers": {"COOKIE": "hunter2"}}},
        {"headers": [["x", "y"], ("authorization", "hunter2")]},
        {"headers": [(b"Authorization", b"hunter2")]},
        {"a": [{"b": ({"master_key": "hunter2"},)}]},
        {"profile": {"env": {"A": "hunter2"}, "name": "x"}},
    ],
    ids=str,
)
def test_secret_names_hide_their_values_at_any_depth(event):
    said = str(redact(None, "info", event))
    assert "hunter2" not in said
    assert "[redacted]" in said


def test_what_is_no_secret_stays_as_it_is():
    event = {
        "n": 1,
        "f": 1.5,
        "b": True,
        "none": None,
        "s": "rk_live",
        "l": [1, "x"],
        "d": {"k": {"v": 2}},
        "t": (1, 2, 3),
    }
    assert redact(None, "info", dict(event)) == {**event, "t": [1, 2, 3]}
    thing = Thing("plain")
    assert redact(None, "info", {"thing": thing})["thing"] is thing


@pytest.fixture
def fresh():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    structlog.reset_defaults()


@pytest.mark.parametrize("form", ["json", "console"])
def test_both_kinds_of_lines_are_redacted_and_name_their_process(form, capsys, fresh):
    configure_logging(form=form, level="info", process="host")
    token = TOKENS[0]
    structlog.get_logger("a").info("ours", request={"query": token}, error=ValueError(token))
    structlog.get_logger("a").debug("too quiet")
    logging.getLogger("b").warning(f"theirs %s {token}", token)
    logging.getLogger("b").info("too quiet")
    try:
        raise RuntimeError(token)
    except RuntimeError:
        structlog.get_logger("a").exception("failed")
        logging.getLogger("b").exception("failed too")
    said = capsys.readouterr()
    assert said.out == ""
    assert token not in said.err
    assert "too quiet" not in said.err
    assert said.err.count("rk_live_[redacted]") >= 5
    if form == "json":
        lines = [json.loads(line) for line in said.err.splitlines()]
        assert [(line["event"][:6], line["level"], line["process"]) for line in lines] == [
            ("ours", "info", "host"),
            ("theirs", "warning", "host"),
            ("failed", "error", "host"),
            ("failed", "error", "host"),
        ]


def test_the_level_changes_for_loggers_that_were_used_before(capsys, fresh):
    level = configure_logging(form="json", level="warning", process="host")
    log = structlog.get_logger("a")
    log.info("one")
    level.set("debug")
    log.debug("two")
    level.set(level.configured)
    log.info("three")
    log.warning("four")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["two", "four"]
    with pytest.raises(KeyError):
        level.set("loud")
    assert level.name == "warning"


def test_files_hold_the_same_lines_within_their_bounds(tmp_path, capsys, fresh):
    path = tmp_path / "log" / "host.log"
    file = LogFile(path, max_bytes=2_000, kept=2)
    configure_logging(form="console", level="info", process="host", file=file)
    for number in range(200):
        structlog.get_logger("a").info("ours", number=number, request={"token": "hunter2"})
        logging.getLogger("b").warning("theirs %s", TOKENS[0])
    file.close()
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["host.log", "host.log.1", "host.log.2"]
    assert all(file.stat().st_size <= 2_000 and file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    lines = [json.loads(line) for file in reversed(files) for line in file.read_text().splitlines()]
    assert {line["process"] for line in lines} == {"host"} and lines[-1]["event"] == "theirs rk_live_[redacted]"
    numbers = [line["number"] for line in lines if line["event"] == "ours"]
    assert numbers == list(range(numbers[0], 200))
    assert "hunter2" not in "".join(file.read_text() for file in files)
    assert capsys.readouterr().err.count("ours") == 200


def test_a_file_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, capsys, fresh):
    (tmp_path / "log").write_text("not a folder")
    file = LogFile(tmp_path / "log" / "host.log", max_bytes=2_000, kept=2)
    configure_logging(form="json", level="info", process="host", file=file)
    for _ in range(3):
        structlog.get_logger("a").info("line")
    said = capsys.readouterr().err
    assert (said.count('"event": "line"'), said.count("log file ")) == (3, 1)


def test_no_file_unless_a_size_is_set(tmp_path):
    assert log_file(Settings(), tmp_path / "x") is None
    made = log_file(Settings(log_file_mb=3, log_files_kept=7), tmp_path / "x")
    assert (made.maxBytes, made.backupCount) == (3 << 20, 7)
