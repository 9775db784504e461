import json
import logging

import pytest
import structlog

from innkeeper.core.token import Dialect, render_token
from innkeeper.log_setup import configure_logging, redact

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
