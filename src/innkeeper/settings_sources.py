"""Where settings come from: a settings file, the environment, options. Unknown names and bad values are refused, all of them at once, in words."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from innkeeper.settings import Settings
from innkeeper.settings_file import CONFIG_VARIABLE, read_settings_file

ENV_PREFIX = "INNKEEPER_"

# Variables with the prefix that are not settings of the server: where the settings are, and what the command line and the tests read.
NOT_SETTINGS = frozenset({CONFIG_VARIABLE, "INNKEEPER_URL", "INNKEEPER_TOKEN", "INNKEEPER_TEST_CACHE"})


class SettingsError(ValueError):
    """Settings that cannot be used. `problems` has one line each: the name as the operator wrote it, where, and what is allowed; never the value."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class SettingsOrigin:
    """Settings, and where each that is not its default came from: `environment`, `option` or the path of the settings file."""

    settings: Settings
    sources: Mapping[str, str]


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, then `overrides` that are not None. Raises SettingsError."""
    return settings_with_origin(None, **overrides).settings


def settings_with_origin(file: Path | None, **overrides: object) -> SettingsOrigin:
    """Settings from a settings file, then the environment, then `overrides` that are not None; the later wins.

    Raises:
        SettingsError: unknown names and bad values, all of them.
        ValueError: the file cannot be read.

    """
    values: dict[str, object] = {}
    written: dict[str, str] = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    for name, value in (read_settings_file(file) if file is not None else {}).items():
        if name in Settings.model_fields:
            values[name], written[name], sources[name] = value, name, str(file)
        else:
            problems.append(f"{file}: unknown setting: {name}{_nearest(name, Settings.model_fields)}")
    if file is not None and "master_key" in values and file.stat().st_mode & 0o077:
        problems.append(f"{file}: others may read it, and it holds master_key: chmod 600 {file}")
    known = {ENV_PREFIX + name.upper(): name for name in Settings.model_fields}
    for variable in sorted(name for name in os.environ if name.startswith(ENV_PREFIX)):
        if variable in known:
            name = known[variable]
            values[name], written[name], sources[name] = os.environ[variable], variable, "environment"
        elif variable not in NOT_SETTINGS:
            problems.append(f"unknown setting: {variable}{_nearest(variable, known)}")
    for name, value in overrides.items():
        if value is not None:
            values[name], written[name], sources[name] = value, "--" + name.replace("_", "-"), "option"
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        problems += _problems(error, written, sources)
    if problems:
        raise SettingsError(problems)
    return SettingsOrigin(settings, sources)


def _nearest(name: str, known: Iterable[str]) -> str:
    def bare(text: str) -> str:
        return text.upper().removeprefix(ENV_PREFIX)

    folded = {bare(one): one for one in known}
    found = difflib.get_close_matches(bare(name), folded, n=1, cutoff=0.6)
    return f"; did you mean {folded[found[0]]}?" if found else ""


def _problems(error: ValidationError, written: Mapping[str, str], sources: Mapping[str, str]) -> Iterable[str]:
    for one in error.errors(include_input=False, include_url=False):
        # What belongs to no single field is said of the address.
        name = str(one["loc"][0]) if one["loc"] else "listen"
        where = f" ({sources[name]})" if sources.get(name, "option") not in ("option", "environment") else ""
        field = Settings.model_fields.get(name)
        if field is None:
            yield f"unknown setting: {name}{_nearest(name, Settings.model_fields)}"
        elif one["type"] == "value_error":
            yield f"{written[name]}{where}: must be {one['msg'].removeprefix('Value error, ')}"
        else:
            allowed = allowed_values(field)
            yield f"{written[name]}{where}: must be {'one of' if allowed.startswith('`') else 'a'} {allowed}"


def allowed_values(field: FieldInfo) -> str:
    """What a setting takes, in words: `whole number from 1 to 65535`."""
    annotation = field.annotation
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    kinds: dict[Any, str] = {int: "whole number", float: "number", bool: "`true`, `false`", Path: "path"}
    members = [member for member in (get_args(annotation) or (annotation,)) if member is not type(None)]
    limits = {type(one).__name__: one for one in field.metadata}
    low = _limit(limits, "Ge", "ge", "from") or _limit(limits, "Gt", "gt", "above")
    high = _limit(limits, "Le", "le", "to") or _limit(limits, "Lt", "lt", "under")
    return " ".join(part for part in (kinds.get(members[0], "text"), low, high) if part)


def _limit(limits: dict[str, Any], name: str, attribute: str, word: str) -> str:
    return f"{word} {getattr(limits[name], attribute)}" if name in limits else ""


def text_of(value: object) -> str:
    """A setting's value as a variable of the environment spells it. A secret is shown."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value).lower() if isinstance(value, bool) else str(value)


def shown(value: object) -> str:
    """A setting's value for people: secrets, and the password of a URL, are hidden."""
    if isinstance(value, SecretStr):
        return "(hidden)"
    return re.sub(r"(?<=://)([^:/@]*):[^/]*@", r"\1:(hidden)@", text_of(value))
