"""The snapshot of an OCI image: what may be asked of it, and the steps that make it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from innkeeper.core.build_plan import SCRIPT_BYTES_MAX, BuildPlan, StagePlan
from innkeeper.core.build_step import RunStep
from innkeeper.core.image_config import DEFAULT_PATH, ImageConfig
from innkeeper.core.profile import validate_env
from innkeeper.core.registry import HOST, Reference, parse_reference
from innkeeper.core.snapshot import validate_name
from innkeeper.errors import InvalidRequestError

VCPU_RANGE = (1, 8)
MEMORY_MB_RANGE = (128, 8_192)
DISK_GB_RANGE = (1, 16)
PACKAGES_MAX = 100
WORDS_CHARACTERS_MAX = 8_192
URL_CHARACTERS_MAX = 2_048
REPOSITORY = "/app/repo"
# What the plan calls the image that was fetched.
BASE = "oci_image"

# Debian's names and versions. A name's last `-` would tell apt to remove it.
_APT = re.compile(
    r"[a-z0-9][a-z0-9.+-]*[a-z0-9+](?::[a-z0-9]+(?:-[a-z0-9]+)*)?(?:=[A-Za-z0-9][A-Za-z0-9.+:~*-]*)?", re.ASCII
)
# A name, extras and versions: neither an address nor a file, nor an option.
_PIP_VERSION = r"(?:===?|~=|!=|<=|>=|<|>)[A-Za-z0-9][A-Za-z0-9.*+!_-]*"
_PIP_EXTRA = "[A-Za-z0-9][A-Za-z0-9._-]*"
_PIP = re.compile(
    rf"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?:\[{_PIP_EXTRA}(?:,{_PIP_EXTRA})*\])?(?:{_PIP_VERSION}(?:,{_PIP_VERSION})*)?",
    re.ASCII,
)
# A name, with a scope where it has one, and a version or a tag: neither an address nor somebody's repository.
_NPM = re.compile(
    r"(?:@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*(?:@[A-Za-z0-9^~<>=*][A-Za-z0-9^~<>=.*+_-]*)?", re.ASCII
)
# No user and password, which every log would show; no query and no fragment.
_GIT_URL = re.compile(rf"https://{HOST}(?::[0-9]{{1,5}})?(?:/[A-Za-z0-9._~+%-]+)+/?", re.ASCII)
_BRANCH = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/+-]{0,198}[A-Za-z0-9_+-])?", re.ASCII)

# Each has its names as arguments: nothing that a request says is ever part of a script.
_APT_SCRIPT = 'apt-get update && apt-get install --yes --no-install-recommends -- "$@" && rm -rf /var/lib/apt/lists/*'
_PIP_SCRIPT = 'exec python3 -m pip install --no-cache-dir -- "$@"'
_NPM_SCRIPT = 'exec npm install --global -- "$@"'
_SHELL = ("/bin/sh", "-c")
_STEP_ENV = {
    "DEBIAN_FRONTEND": "noninteractive",
    # The image's own Python is what is wanted: nothing else shares the guest.
    "PIP_BREAK_SYSTEM_PACKAGES": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
    "GIT_TERMINAL_PROMPT": "0",
    # Wherever a server redirects to.
    "GIT_ALLOW_PROTOCOL": "https",
}


@dataclass(frozen=True, slots=True)
class SnapshotBuildRequest:
    """An OCI image, what is installed on it, and the shape of its VMs. `envs` are variables of the steps, and of all that runs in its VMs.

    An `oci_image` without a registry is in `default_registry`, where there is one.

    Raises:
        InvalidRequestError: naming the field.

    """

    oci_image: str
    name: str | None = None
    vcpu_count: int = 2
    memory_mb: int = 512
    disk_gb: int | None = None
    apt: str = ""
    pip: str = ""
    npm: str = ""
    git_url: str | None = None
    git_branch: str | None = None
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)
    command: str | None = field(default=None, repr=False)
    default_registry: str = ""

    def __post_init__(self) -> None:
        _ = self.reference
        validate_name(self.label)
        for name, value, (low, high) in (
            ("vcpu_count", self.vcpu_count, VCPU_RANGE),
            ("memory_mb", self.memory_mb, MEMORY_MB_RANGE),
            ("build_args.disk_size_gb", self.disk_gb, DISK_GB_RANGE),
        ):
            if value is not None and not low <= value <= high:
                raise InvalidRequestError(f"{name}: must be between {low} and {high}")
        _words(self.apt, _APT, "build_args.extra_apt_packages")
        _words(self.pip, _PIP, "build_args.extra_pip_packages")
        _words(self.npm, _NPM, "build_args.extra_npm_packages")
        _check_git(self.git_url, self.git_branch)
        validate_env(dict(self.envs), "build_args.envs")
        if self.command is not None:
            size = len(self.command.encode("utf-8", "surrogatepass"))
            if "\0" in self.command or not self.command.strip() or size > SCRIPT_BYTES_MAX:
                raise InvalidRequestError(
                    f"build_args.post_build_cmd: a command of at most {SCRIPT_BYTES_MAX} bytes, without NUL"
                )

    @property
    def reference(self) -> Reference:
        """The image in its registry."""
        try:
            return parse_reference(self.oci_image, default_registry=self.default_registry)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"oci_image: {error.message.removeprefix('reference: ')}") from None

    @property
    def label(self) -> str:
        """What it is called."""
        return self.oci_image[:200] if self.name is None else self.name

    def plan(self, config: ImageConfig) -> BuildPlan | None:
        """The steps on an image of such a configuration, which its VMs keep; None where it is wanted as it is."""
        steps = tuple(self._steps(config))
        return BuildPlan((StagePlan(0, 0, "build", BASE, steps, config),), ()) if steps else None

    def _steps(self, config: ImageConfig) -> Iterator[RunStep]:
        env = {"PATH": DEFAULT_PATH, **config.env, **_STEP_ENV, **self.envs}
        for text, script, words in (
            ("extra_apt_packages", _APT_SCRIPT, self.apt.split()),
            ("extra_pip_packages", _PIP_SCRIPT, self.pip.split()),
            ("extra_npm_packages", _NPM_SCRIPT, self.npm.split()),
        ):
            if words:
                yield RunStep(0, f"{text} {' '.join(words)}", (*_SHELL, script, "sh", *words), env, "root", "/")
        if self.git_url is not None:
            branch = () if self.git_branch is None else (f"--branch={self.git_branch}",)
            argv = ("git", "clone", *branch, "--", self.git_url, REPOSITORY)
            yield RunStep(0, f"git_clone_url {self.git_url}", argv, env, "root", "/")
        if self.command is not None:
            cwd = REPOSITORY if self.git_url is not None else config.workdir or "/"
            # What it says may be a secret: its name is enough.
            yield RunStep(0, "post_build_cmd", (*_SHELL, self.command), env, "root", cwd)


def _words(text: str, pattern: re.Pattern[str], field_name: str) -> None:
    words = text.split()
    if len(words) > PACKAGES_MAX or len(text) > WORDS_CHARACTERS_MAX:
        raise InvalidRequestError(f"{field_name}: at most {PACKAGES_MAX} packages")
    for word in words:
        if not pattern.fullmatch(word):
            raise InvalidRequestError(f"{field_name}: {word[:100]!r} is not the name of a package")


def _check_git(url: str | None, branch: str | None) -> None:
    if url is None:
        if branch is not None:
            raise InvalidRequestError("build_args.git_clone_branch: there is no git_clone_url")
        return
    # Not shown: it may hold a password, which is why it is refused.
    if len(url) > URL_CHARACTERS_MAX or not _GIT_URL.fullmatch(url) or "/../" in f"{url}/":
        raise InvalidRequestError(
            "build_args.git_clone_url: must be like https://git.example.com/team/app, without a user, a query and a fragment"
        )
    if branch is not None and (
        not _BRANCH.fullmatch(branch) or ".." in branch or "//" in branch or branch.endswith(".lock")
    ):
        raise InvalidRequestError("build_args.git_clone_branch: not the name of a branch")
