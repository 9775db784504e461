"""Logging: structlog for our lines, the standard library's for everybody else's, one form for both, secrets taken out of both."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

SECRET_NAMES = frozenset({"authorization", "token", "api_key", "password", "secret", "master_key", "cookie", "env"})
SECRET_FORMS = re.compile(r"\b(rk_live_|rk_test_|instavm_sk_|gn_live_|sp_live_)[A-Za-z0-9_-]+")


def redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace values under secret names, and whatever has the form of a token."""
    for name, value in event.items():
        if name.lower() in SECRET_NAMES:
            event[name] = "[redacted]"
        elif isinstance(value, str):
            event[name] = SECRET_FORMS.sub(r"\1[redacted]", value)
    return event


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
