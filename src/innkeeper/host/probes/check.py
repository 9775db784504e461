"""The check: one fact about this host, and what to paste when it is not as it must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One fact. `ok` is None for a warning; `fix` is one command line; without a `required` one the default driver cannot run."""

    name: str
    ok: bool | None
    detail: str
    fix: str | None = None
    required: bool = False

    @property
    def word(self) -> str:
        """`ok`, `warn` or `FAIL`: a failure that does not keep the default driver from running is a warning."""
        if self.ok:
            return "ok"
        return "FAIL" if self.blocks else "warn"

    @property
    def blocks(self) -> bool:
        """Whether the default driver cannot run because of it."""
        return self.ok is False and self.required

    def sentence(self) -> str:
        """What `inn doctor` and a refusing `inn serve` say about it."""
        return f"{self.name}: {self.detail}" + (f"\n  FIX: {self.fix}" if self.fix else "")

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Findings:
    """What one probe found: its checks, and facts (JSON values) that others build on."""

    checks: tuple[Check, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    # Whether another look would find the same: false for what a busy moment or a missing right may have decided.
    lasting: bool = True

    @property
    def good(self) -> bool:
        """Whether they may be remembered: a failure is looked at again each time, since somebody may have pasted the fix."""
        return self.lasting and all(check.ok is not False or not check.required for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"checks": [check.as_dict() for check in self.checks], "facts": dict(self.facts)}


def findings_from_dict(value: Mapping[str, Any]) -> Findings:
    """The findings of `Findings.as_dict`. Raises TypeError or KeyError for anything else."""
    return Findings(tuple(Check(**check) for check in value["checks"]), dict(value["facts"]))
