"""Logging: structlog for our lines, the standard library's for everybody else's, one form for both, secrets taken out of both."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog

SECRET_NAMES = frozenset({"authorization", "token", "api_key", "password", "secret", "master_key", "cookie", "env"})
# Anywhere in a text: `%20rk_live_…` of a URL has no word boundary before it.
SECRET_FORMS = re.compile(r"(rk_live_|rk_test_|instavm_sk_|gn_live_|sp_live_)[A-Za-z0-9_-]+")
MAX_DEPTH = 8


def redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace values under secret names, and whatever has the form of a token, at any depth of a value."""
    for name, value in event.items():
        event[name] = _redacted(name, value, MAX_DEPTH)
    return event


def _redacted(name: object, value: Any, depth: int) -> Any:
    if isinstance(name, bytes):
        name = name.decode("latin-1")
    if isinstance(name, str) and name.lower() in SECRET_NAMES:
        return "[redacted]"
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return SECRET_FORMS.sub(r"\1[redacted]", value)
    if isinstance(value, (Mapping, list, tuple, set, frozenset)):
        if depth == 0:
            return "[nested too deep]"
        if isinstance(value, Mapping):
            return {_redacted(None, key, 0): _redacted(key, item, depth - 1) for key, item in value.items()}
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], (str, bytes)):
            # A header.
            return value[0], _redacted(value[0], value[1], depth - 1)
        return [_redacted(None, item, depth - 1) for item in value]
    text = repr(value)
    return SECRET_FORMS.sub(r"\1[redacted]", text) if SECRET_FORMS.search(text) else value


def configure_logging(*, form: str, level: str, process: str) -> None:
    """Log to stderr as `console` or `json`, from `level` on, each line with the name of its process."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        lambda _, __, event: {**event, "process": process},
        structlog.processors.format_exc_info,
        redact,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processor=renderer))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries speak up for warnings only: their debug lines may hold what ours never would.
    root.setLevel(max(number, logging.WARNING))
