"""The settings file: TOML, the settings' names in lower case without their prefix. Light to import, so that every command may look into it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

CONFIG_VARIABLE = "INNKEEPER_CONFIG"
DEFAULT_PATH = Path("/etc/innkeeper/innkeeper.toml")
DEFAULT_HOME = Path("/var/lib/innkeeper")


def find_settings_file(named: Path | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The settings file: the one `named`, else INNKEEPER_CONFIG's (empty: none), else the default one if it is there."""
    if named is not None:
        return named
    if (text := environment.get(CONFIG_VARIABLE)) is not None:
        return Path(text) if text else None
    return DEFAULT_PATH if DEFAULT_PATH.exists() else None


def read_settings_file(path: Path) -> dict[str, object]:
    """The file's entries as they stand there; nothing is known of their names here.

    Raises:
        ValueError: it cannot be read or is not TOML, naming the path and never its content, which may hold a key.

    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None


def home_of(named: Path | None) -> Path:
    """The state directory that the settings file names, or the default one; for commands that only look for the server's socket."""
    path = find_settings_file(named)
    if path is None or (named is None and not os.access(path, os.R_OK)):
        return DEFAULT_HOME
    home = read_settings_file(path).get("home")
    return Path(home) if isinstance(home, str) else DEFAULT_HOME
