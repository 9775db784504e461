"""Logging: structlog for our lines, the standard library's for everybody else's, one form for both, secrets taken out of both."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import structlog

from innkeeper.settings import Settings

SECRET_NAMES = frozenset({"authorization", "token", "api_key", "password", "secret", "master_key", "cookie", "env"})
# Anywhere in a text: `%20rk_live_…` of a URL has no word boundary before it.
SECRET_FORMS = re.compile(r"(rk_live_|rk_test_|instavm_sk_|gn_live_|sp_live_)[A-Za-z0-9_-]+")
MAX_DEPTH = 8
METHODS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
LEVELS = tuple(METHODS)


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


class LogLevel:
    """The least severe level that is logged, which the operator may change while the process runs."""

    def __init__(self, name: str) -> None:
        self.configured = name
        self.name = name
        self.number = 0
        self.set(name)

    def set(self, name: str) -> None:
        """Log from this level on. Raises KeyError for a name that is none of the setting's."""
        self.number = METHODS[name]
        self.name = name

    def filter(self, _: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A processor that drops what is less severe."""
        if METHODS.get(method, logging.CRITICAL) < self.number:
            raise structlog.DropEvent
        return event


class LogFile(RotatingFileHandler):
    """JSON lines in a file of the owner's alone; when it has `max_bytes` it becomes `.1`, that one `.2`, and so on up to `kept`."""

    def __init__(self, path: Path, *, max_bytes: int, kept: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=kept, encoding="utf-8", delay=True)
        self._render = structlog.processors.JSONRenderer()
        self._complained = False

    def _open(self) -> TextIOWrapper:
        path = Path(self.baseFilename)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not open()'s mode, which the umask decides.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return TextIOWrapper(os.fdopen(descriptor, "ab", buffering=0), encoding="utf-8", write_through=True)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """A full disk must not stop the server, nor fill the other log: it is said once."""
        if not self._complained:
            self._complained = True
            print(f"log file {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)

    def copy(self, _: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A processor that writes the line and passes it on."""
        # Beside what the library of foreign lines keeps for itself.
        plain = {name: value for name, value in event.items() if not name.startswith("_")}
        line = self._render(None, "", plain)
        self.handle(logging.LogRecord("", logging.INFO, "", 0, str(line), None, None))
        return event


def log_file(settings: Settings, path: Path) -> LogFile | None:
    """The log file at `path` as the settings want it, or None."""
    if settings.log_file_mb == 0:
        return None
    return LogFile(path, max_bytes=settings.log_file_mb << 20, kept=settings.log_files_kept)


def configure_logging(*, form: str, level: str, process: str, file: LogFile | None = None) -> LogLevel:
    """Log to stderr as `console` or `json`, and to `file`, each line with the name of its process; the level that it may be changed by."""
    threshold = LogLevel(level)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        lambda _, __, event: {**event, "process": process},
        structlog.processors.format_exc_info,
        redact,
        *([] if file is None else [file.copy]),
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[threshold.filter, *shared, renderer],
        # Everything reaches the filter, because a logger that was used once keeps its class.
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processor=renderer))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries speak up for warnings only: their debug lines may hold what ours never would.
    root.setLevel(max(threshold.number, logging.WARNING))
    return threshold
