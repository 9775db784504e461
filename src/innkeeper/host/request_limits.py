"""Limits of what the bus may ask for, beyond types: the API process is another trust domain, and this one is root."""

from __future__ import annotations

import re
from ipaddress import IPv4Network
from typing import Any

from innkeeper.core.build_verbs import ExportStep, FindSteps, SaveStep
from innkeeper.core.checkpoint_verbs import ForkMachine, RestoreCheckpoint
from innkeeper.core.egress_policy import CIDRS_MAX, HOST_MODES
from innkeeper.core.host_verbs import CollectImages, EnsureMachine, Execute, MachineShape, SetPools, SignalExecution
from innkeeper.core.image_config import IMAGE_USER_PATTERN
from innkeeper.core.log_verbs import LINES_MAX, WAIT_SECONDS_MAX, ReadLog
from innkeeper.core.port_verbs import DialPort
from innkeeper.core.profile import DISK_MB_RANGE, MEMORY_MB_RANGE, VCPU_RANGE, WARM_POOL_RANGE
from innkeeper.core.program_verbs import RunProgram
from innkeeper.core.terminal_verbs import (
    COMMAND_BYTES_MAX,
    SIZE_RANGE,
    TERMINAL_NAME,
    AttachTerminal,
    EndTerminal,
    ResizeTerminal,
    StartTerminal,
)
from innkeeper.core.volume_verbs import SIZE_MB_RANGE as VOLUME_MB_RANGE
from innkeeper.core.volume_verbs import AttachVolume, CreateVolume, GrowVolume, mount_path_error
from innkeeper.errors import InvalidRequestError

DIGEST = re.compile(r"[0-9a-f]{64}")
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
KERNEL = re.compile(r"[0-9A-Za-z._-]{1,64}")
MAX_TIMEOUT_SECONDS = 3_600
EGRESS_PORTS_MAX = 16
MAX_ANSWER_BYTES = 16_777_216
MAX_PROGRAMS = 4


def check_limits(request: Any) -> None:  # one of VERBS, already of the right types
    """Raise InvalidRequestError for a request that no honest control side sends."""
    if isinstance(request, EnsureMachine):
        _check_shape(request.shape)
        _check_name(request.hostname, request.user)
        if request.step_key is not None:
            _check_key(request.step_key)
    elif isinstance(request, (RestoreCheckpoint, ForkMachine)):
        check_limits(request.machine)
        if request.machine.step_key is not None or request.machine.bare:
            raise InvalidRequestError("machine: a step of a build begins with nothing but its step_key")
    elif isinstance(request, SaveStep):
        _check_key(request.key)
    elif isinstance(request, ExportStep):
        for key in (request.key, request.image_digest):
            _check_key(key or "0" * 64)
        if (request.key is None) == (request.image_digest is None):
            raise InvalidRequestError("either a key or an image_digest")
    elif isinstance(request, FindSteps):
        for key in request.keys:
            _check_key(key)
    elif isinstance(request, SetPools):
        for pool in request.pools:
            _check_shape(pool.shape)
            _check_name(pool.hostname, pool.user)
            _check_range("size", pool.size, WARM_POOL_RANGE)
    elif isinstance(request, CollectImages):
        if not all(DIGEST.fullmatch(digest) for digest in request.keep):
            raise InvalidRequestError("keep: not SHA-256s")
    elif isinstance(request, DialPort):
        _check_range("port", request.port, (1, 65_535))
    elif isinstance(request, Execute):
        if not 0 < request.timeout_seconds <= MAX_TIMEOUT_SECONDS:
            raise InvalidRequestError(f"timeout_seconds: more than 0, at most {MAX_TIMEOUT_SECONDS}")
        _check_range("answer_bytes", request.answer_bytes, (0, MAX_ANSWER_BYTES))
        if request.kernel is not None and not KERNEL.fullmatch(request.kernel):
            raise InvalidRequestError("kernel: not a kernel's name")
    elif isinstance(request, SignalExecution):
        _check_range("signal", request.signal, (1, 64))
    elif isinstance(request, (CreateVolume, GrowVolume)):
        _check_range("size_mb", request.size_mb, VOLUME_MB_RANGE)
    elif isinstance(request, AttachVolume):
        wrong = mount_path_error(request.path)
        if wrong is not None:
            raise InvalidRequestError(f"path: {wrong}")
    elif isinstance(request, (StartTerminal, ResizeTerminal, EndTerminal, AttachTerminal)):
        _check_terminal(request)
    elif isinstance(request, RunProgram):
        _check_program(request)
    elif isinstance(request, ReadLog):
        _check_log(request)


def _check_terminal(request: StartTerminal | ResizeTerminal | EndTerminal | AttachTerminal) -> None:
    if request.name is not None and not TERMINAL_NAME.fullmatch(request.name):
        raise InvalidRequestError("name: not one of a terminal")
    if isinstance(request, (StartTerminal, ResizeTerminal)):
        _check_range("cols", request.cols, SIZE_RANGE)
        _check_range("rows", request.rows, SIZE_RANGE)
    if isinstance(request, AttachTerminal) and request.offset < 0:
        raise InvalidRequestError("offset: not negative")
    if isinstance(request, StartTerminal):
        if not 1 <= len(request.programs) <= MAX_PROGRAMS or not all(request.programs):
            raise InvalidRequestError(f"programs: 1 to {MAX_PROGRAMS}, each with a name")
        # The label stays on the host for as long as the terminal is known.
        if len(request.label) + sum(len(word) for words in request.programs for word in words) > 4 * COMMAND_BYTES_MAX:
            raise InvalidRequestError("programs: too long")


def _check_log(request: ReadLog) -> None:
    _check_range("limit", request.limit, (1, LINES_MAX))
    if request.after < 0 or (request.newest is not None and request.newest < 0):
        raise InvalidRequestError("after, newest: not negative")
    if not 0 <= request.wait_seconds <= WAIT_SECONDS_MAX:
        raise InvalidRequestError(f"wait_seconds: at most {WAIT_SECONDS_MAX:.0f}")


def _check_program(request: RunProgram) -> None:
    if (
        (request.command is None) == (not request.programs)
        or len(request.programs) > MAX_PROGRAMS
        or not all(request.programs)
    ):
        raise InvalidRequestError(f"either a command or 1 to {MAX_PROGRAMS} programs, each with a name")
    if (request.cols is None) != (request.rows is None):
        raise InvalidRequestError("cols, rows: both or none")
    if request.cols is not None and request.rows is not None:
        _check_range("cols", request.cols, SIZE_RANGE)
        _check_range("rows", request.rows, SIZE_RANGE)
    words = [request.command or "", *(word for program in request.programs for word in program)]
    if sum(map(len, words)) > 4 * COMMAND_BYTES_MAX:
        raise InvalidRequestError("command, programs: too long")


def _check_shape(shape: MachineShape) -> None:
    # The digest becomes a path on the host.
    if not DIGEST.fullmatch(shape.image_digest):
        raise InvalidRequestError("image_digest: not a SHA-256")
    if shape.egress_mode not in HOST_MODES:
        raise InvalidRequestError(f"egress_mode: one of {', '.join(HOST_MODES)}")
    if len(shape.egress_ports) > EGRESS_PORTS_MAX or len(shape.egress_cidrs) > CIDRS_MAX:
        raise InvalidRequestError("egress: too many ports or networks")
    for port in shape.egress_ports:
        _check_range("egress_ports", port, (1, 65_535))
    for network in shape.egress_cidrs:
        # It becomes a line of nft.
        try:
            IPv4Network(network)
        except ValueError:
            raise InvalidRequestError("egress_cidrs: not an IPv4 network") from None
    _check_range("vcpu_count", shape.vcpu_count, VCPU_RANGE)
    _check_range("memory_mb", shape.memory_mb, MEMORY_MB_RANGE)
    _check_range("disk_mb", shape.disk_mb, DISK_MB_RANGE)
    _check_name("room", shape.user)


def _check_key(key: str) -> None:
    # It becomes a path on the host.
    if not DIGEST.fullmatch(key):
        raise InvalidRequestError("key: not a SHA-256")


def _check_name(hostname: str, user: str | None) -> None:
    if not LABEL.fullmatch(hostname):
        raise InvalidRequestError("hostname: not a host name")
    if user is not None and not IMAGE_USER_PATTERN.fullmatch(user):
        raise InvalidRequestError("user: not a user name")


def _check_range(name: str, value: int, limits: tuple[int, int]) -> None:
    low, high = limits
    if not low <= value <= high:
        raise InvalidRequestError(f"{name}: must be between {low} and {high}")
