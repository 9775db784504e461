"""One import on its disk: what its steps are, each in a jail that sees its part of the disk and nothing else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from innkeeper.core.image_config import IMAGE_USER_PATTERN, ImageConfig, config_from_json
from innkeeper.core.profile import ENV_BYTES_MAX
from innkeeper.core.registry import Reference, RegistryPolicy, parse_policy
from innkeeper.errors import InvalidRequestError, UnavailableError
from innkeeper.host.disks import oci_tidy
from innkeeper.host.disks.image_build import EROFS_OPTIONS
from innkeeper.host.disks.registry_authorities import read_authorities
from innkeeper.host.linux import command, netns, pidfd
from innkeeper.host.linux.cgroup import Group
from innkeeper.host.linux.jail import FIRST_UID, NOBODY, PROXY_PORT, JailPlan

MIB = 1_048_576
MANIFEST_BYTES_MAX = 4 * MIB
LINE_CHARACTERS = 500
TAIL_LINES = 5
LINES_MAX = 5_000
PYTHON = "/usr/bin/python3"
# Go reads these besides the host's bundle.
TRUSTED = "/given/authorities:/etc/ssl/certs"
# The same content makes the same file, whoever imports it under whatever name.
EROFS_UUID = "6f0b1c5e-3f0c-5d57-9d0e-6f63692d696d"
# Part of what a known source stands for: a change of what is made of it makes it anew.
RECIPE_VERSION = "1"
_MESSAGE = re.compile(r'msg="((?:[^"\\]|\\.)*)"')
_QUERY = re.compile(r"\?[^\s\"'\\]+")

Say = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ImportLimits:
    """What one import may take: unpacked MiB (and as much again for what is fetched), files, seconds; and how many go on at the same time."""

    max_mib: int
    max_files: int
    seconds: float
    reserve_mib: int
    parallel: int = 2


@dataclass(frozen=True, slots=True)
class ImportSource:
    """Where the image comes from: `kind` is `registry`, `oci-archive` or `docker-archive`; archives arrive as `content`."""

    kind: str
    reference: Reference | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    content: AsyncIterator[bytes] | None = None


@dataclass(frozen=True, slots=True)
class RegistryRoutes:
    """How registries are reached: `allow` is the setting `image_registries`, `authorities` a PEM file of the operator's own, `name_servers` whom to ask for
    names (none: as the host does), `host_netns` the network from which it is done (None: the daemon's own)."""

    allow: str = ""
    authorities: Path | None = None
    name_servers: tuple[str, ...] = ()
    host_netns: str | None = None

    @property
    def policy(self) -> RegistryPolicy:
        """What `allow` says."""
        return parse_policy(self.allow)


@dataclass(slots=True)
class ImportJob:
    """One import on its disk. Each step is a jail that sees its part of the disk and nothing else."""

    disk: Path
    limits: ImportLimits
    routes: RegistryRoutes
    group: Group
    say: Say
    created: int = 0
    lines: int = 0

    def prepare(self) -> None:
        """The folders: what is given, what is fetched (a user's without capabilities), what is unpacked (the jail's root's), and the jail's mount point."""
        for name, owner in (("given", 0), ("fetched", FIRST_UID + NOBODY), ("unpacked", FIRST_UID), ("jail", 0)):
            (self.disk / name).mkdir(mode=0o755)
            os.chown(self.disk / name, owner, owner)
        (self.disk / "fetched" / "tmp").mkdir()
        os.chown(self.disk / "fetched" / "tmp", FIRST_UID + NOBODY, FIRST_UID + NOBODY)

    async def receive(self, source: ImportSource) -> str:
        """Write the archive that arrives to the disk; the key of this very content."""
        assert source.content is not None  # noqa: S101 - asked for by the caller
        await self.say({"step": "receiving"})
        digest, size = hashlib.sha256(), 0
        with (self.disk / "given" / "archive").open("wb") as file:
            async for piece in source.content:
                size += len(piece)
                if size > self.limits.max_mib * MIB:
                    raise InvalidRequestError(f"The archive has more than {self.limits.max_mib} MiB")
                digest.update(piece)
                await asyncio.to_thread(file.write, piece)
        return _key(source.kind, digest.hexdigest())

    async def resolve(self, source: ImportSource) -> tuple[ImportSource, str]:
        """The source by the digest that its name stands for now, and the key of that."""
        assert source.reference is not None  # noqa: S101 - asked for by the caller
        await self.say({"step": "asking the registry"})
        self._write_credentials(source)
        self._write_authorities()
        manifest = self.disk / "given" / "manifest"
        argv = ["inspect", "--raw", *self._source_options(source), f"docker://{source.reference}"]
        with manifest.open("wb") as output:
            await self._skopeo(argv, proxied=True, stdout=output, file_bytes=MANIFEST_BYTES_MAX)
        digest = "sha256:" + await asyncio.to_thread(sha256_of, manifest)
        if source.reference.digest not in (None, digest):
            raise InvalidRequestError("The registry answered with another image than the digest names")
        reference = source.reference.at(digest)
        await self.say({"line": f"{source.reference} is {digest}"})
        return ImportSource("registry", reference, source.username, source.password), _key("registry", digest)

    def _write_credentials(self, source: ImportSource) -> None:
        """A file that the jail's user alone can read: nothing of it is ever on a command line."""
        auths = {}
        if source.reference is not None and source.username is not None:
            pair = f"{source.username}:{source.password or ''}".encode()
            auths[source.reference.registry] = {"auth": base64.b64encode(pair).decode()}
        path = self.disk / "given" / "auth.json"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"auths": auths}, file)
        os.chown(path, FIRST_UID + NOBODY, FIRST_UID + NOBODY)

    def _write_authorities(self) -> None:
        """A folder of certificates that the jail trusts besides those of the host; empty where the operator has none."""
        folder = self.disk / "given" / "authorities"
        folder.mkdir(exist_ok=True)
        if self.routes.authorities is not None:
            try:
                (folder / "operator.pem").write_bytes(read_authorities(self.routes.authorities))
            except ValueError as error:
                raise UnavailableError(f"The host's file of certificate authorities: {error}") from None

    def _source_options(self, source: ImportSource) -> list[str]:
        assert source.reference is not None  # noqa: S101 - asked for by the caller
        insecure = self.routes.policy.may_be_insecure(source.reference.registry)
        return ["--authfile=/given/auth.json", *(["--tls-verify=false"] if insecure else [])]

    async def fetch(self, source: ImportSource) -> None:
        """Have the image as an OCI layout at /fetched/oci of the jail."""
        await self.say({"step": "fetching"})
        target = "oci:/fetched/oci:image"
        if source.reference is not None:
            options = [
                option.replace("--authfile", "--src-authfile").replace("--tls-verify", "--src-tls-verify")
                for option in self._source_options(source)
            ]
            await self._skopeo(["copy", *options, f"docker://{source.reference}", target], proxied=True)
        else:
            await self._skopeo(["copy", f"{source.kind}:/given/archive", target], proxied=False)
        for name in ("archive", "auth.json"):
            (self.disk / "given" / name).unlink(missing_ok=True)

    async def _skopeo(
        self, argv: Sequence[str], *, proxied: bool, stdout: Any = None, file_bytes: int | None = None
    ) -> None:
        # No policy of signatures: what is imported is the user's choice, and runs as hostile as anything else.
        program = ("/usr/bin/skopeo", "--insecure-policy", "--tmpdir=/fetched/tmp", *argv)
        proxy = f"http://127.0.0.1:{PROXY_PORT}"
        way_out = {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy, "SSL_CERT_DIR": TRUSTED} if proxied else {}
        plan = JailPlan(
            argv=program,
            binds=(
                (str(self.disk / "given"), "/given", "ro"),
                (str(self.disk / "fetched"), "/fetched", "rw"),
            ),
            mount_point=str(self.disk / "jail"),
            env={"TMPDIR": "/fetched/tmp", **way_out},
            # An archive is unpacked by skopeo itself, which gives its files the owners that it names.
            root=not proxied,
            groups=self._groups(),
            file_bytes=file_bytes or self.limits.max_mib * MIB,
        )
        if not proxied:
            await self._run(plan, what="skopeo", stdout=stdout)
            return
        inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with inside, outside:
            async with self._proxy(outside) as refusals:
                plan = dataclasses.replace(plan, listener=inside.fileno())
                try:
                    await self._run(plan, what="skopeo", stdout=stdout, pass_fds=(inside.fileno(),), after=inside.close)
                except InvalidRequestError as error:
                    # What the proxy said is the reason; what skopeo made of it is not.
                    await asyncio.sleep(0)
                    if refusals:
                        raise InvalidRequestError(refusals[-1]) from error
                    raise

    @asynccontextmanager
    async def _proxy(self, way: socket.socket) -> AsyncIterator[list[str]]:
        refusals: list[str] = []
        routes = self.routes
        told = {
            "listener": way.fileno(),
            "parent": os.getpid(),
            "allow": routes.allow,
            "name_servers": routes.name_servers,
            "max_bytes": self.limits.max_mib * MIB,
        }
        inside = [] if routes.host_netns is None else ["nsenter", f"--net={netns.path_of(routes.host_netns)}", "--"]
        process = await command.spawn(
            [*inside, sys.executable, "-I", "-m", "innkeeper.host.registry_proxy", json.dumps(told)],
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(way.fileno(),),
        )
        way.close()

        async def listen() -> None:
            assert process.stdout is not None  # noqa: S101 - asked for above
            with contextlib.suppress(ValueError):
                async for line in process.stdout:
                    # One by one: each counts as soon as it is said.
                    refusals.append(  # noqa: PERF401
                        str(json.loads(line)["refused"])[:LINE_CHARACTERS]
                    )

        listening = asyncio.ensure_future(listen())
        try:
            yield refusals
        finally:
            await asyncio.shield(command.end(process))
            listening.cancel()
            await asyncio.wait({listening})

    async def unpack(self) -> ImageConfig:
        """Unpack the layers, tidy the tree, and read the configuration."""
        await self.say({"step": "unpacking"})
        binds = (
            (str(self.disk / "fetched" / "oci"), "/oci", "ro"),
            (str(self.disk / "unpacked"), "/unpacked", "rw"),
            (oci_tidy.__file__, "/oci_tidy.py", "ro"),
        )
        unpack = ("/usr/bin/umoci", "raw", "unpack", "--rootless", "--image", "/oci:image", "/unpacked/root")
        await self._run(self._root_plan(unpack, binds), what="umoci")
        shutil.rmtree(self.disk / "fetched" / "tmp", ignore_errors=True)
        maxima = (str(self.limits.max_files), str(self.limits.max_mib * MIB))
        tidy = (PYTHON, "-I", "-S", "/oci_tidy.py", "/oci", "/unpacked/root", *maxima)
        report = await self._run(self._root_plan(tidy, binds), what="tidying", quiet=True)
        try:
            answer = json.loads(report)
            if "error" in answer:
                raise InvalidRequestError(str(answer["error"])[:LINE_CHARACTERS])
            self.created = int(answer["created"])
            config = config_from_json(answer["config"])
            await self.say({"line": f"{int(answer['files'])} files, {int(answer['bytes']) // MIB} MiB"})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequestError("The image cannot be tidied") from error
        return checked_config(config)

    async def compress(self, work: Path) -> Path:
        """The EROFS file of the tree, in a folder of the store."""
        await self.say({"step": "compressing"})
        target = work / "image.erofs"
        target.touch(mode=0o600)
        os.chown(target, FIRST_UID, FIRST_UID)
        # No extended attributes: those of overlays would mean something to ours, and gVisor knows no others. File capabilities go with them.
        argv = ("/usr/bin/mkfs.erofs", "--quiet", *EROFS_OPTIONS.split(), "-x-1", "-U", EROFS_UUID, "/image.erofs", "/unpacked/root")  # fmt: skip
        binds = ((str(self.disk / "unpacked"), "/unpacked", "ro"), (str(target), "/image.erofs", "rw"))
        plan = self._root_plan(argv, binds, env={"SOURCE_DATE_EPOCH": str(self.created)})
        began = time.monotonic()
        await self._run(plan, what="mkfs.erofs")
        await self.say({"line": f"{target.stat().st_size // MIB} MiB, compressed in {time.monotonic() - began:.1f} s"})
        os.chown(target, 0, 0)
        return target

    def _root_plan(
        self, argv: tuple[str, ...], binds: tuple[tuple[str, str, str], ...], *, env: dict[str, str] | None = None
    ) -> JailPlan:
        return JailPlan(
            argv=argv,
            binds=binds,
            mount_point=str(self.disk / "jail"),
            env=env or {},
            root=True,
            groups=self._groups(),
            file_bytes=self.limits.max_mib * MIB,
        )

    def _groups(self) -> tuple[str, ...]:
        return tuple(str(directory) for directory in self.group.directories())

    async def _run(
        self,
        plan: JailPlan,
        *,
        what: str,
        stdout: Any = None,
        quiet: bool = False,
        pass_fds: tuple[int, ...] = (),
        after: Callable[[], None] = lambda: None,
    ) -> str:
        """Run a jail to its end, its lines told as they come; the last line. Raises InvalidRequestError with what it said last."""
        pipe = asyncio.subprocess.PIPE
        process = await command.spawn(
            plan.command(),
            stdout=pipe if stdout is None else stdout,
            stderr=asyncio.subprocess.STDOUT if stdout is None else pipe,
            pass_fds=pass_fds,
        )
        after()
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        ending = asyncio.ensure_future(self._end_all_after(process.pid))
        try:
            reader = process.stdout if stdout is None else process.stderr
            assert reader is not None  # noqa: S101 - asked for above
            async for line in _lines(reader, whole=quiet):
                tail.append(line)
                self.lines += 1
                if not quiet and self.lines <= LINES_MAX:
                    await self.say({"line": line[:LINE_CHARACTERS]})
            status = await process.wait()
        finally:
            ending.cancel()
            await asyncio.wait({ending})
            await asyncio.shield(command.end(process))
        if status != 0 and not (quiet and tail):
            raise InvalidRequestError(f"{what}: {self._reason(tail, status)}")
        return tail[-1] if tail else ""

    async def _end_all_after(self, pid: int) -> None:
        """End what is left of a jail when its outer process has ended: what asked the kernel not to be told would hold the pipe for the import's whole time."""
        # The process's own wait() waits for the pipe, too.
        await pidfd.wait_gone(pid)
        with contextlib.suppress(OSError, TimeoutError):  # which the release of the import tries again, and says
            await self.group.kill_all()

    def _reason(self, tail: Sequence[str], status: int) -> str:
        said = " / ".join(tail).lower()
        if "no space left on device" in said or "file too large" in said:
            return f"the image is larger than an import may be ({self.limits.max_mib} MiB)"
        last = tail[-1].lstrip("\u2a2f\u2022 ") if tail else ""
        if "certificate signed by unknown authority" in said:
            last += ". The operator of the host can name further authorities"
        return last[-LINE_CHARACTERS:] or command.describe_status(status if status < 128 else 128 - status)


def checked_config(config: ImageConfig) -> ImageConfig:
    """The configuration, if rooms can be made with it.

    Raises:
        InvalidRequestError: naming what is wrong.

    """
    if not IMAGE_USER_PATTERN.fullmatch(config.user):
        raise InvalidRequestError(f"The image's USER {config.user[:64]!r} is not one that a room can have")
    for name, value in config.env.items():
        if not name or "\0" in name + value:
            raise InvalidRequestError("The image's ENV has a name or a value that no variable can have")
    if sum(len(name.encode()) + len(value.encode()) + 2 for name, value in config.env.items()) > ENV_BYTES_MAX:
        raise InvalidRequestError(f"The image's ENV has more than {ENV_BYTES_MAX} bytes")
    workdir = config.workdir
    if "\0" in workdir or len(workdir) > 4_096:
        raise InvalidRequestError("The image's WORKDIR is not a path")
    if workdir and not workdir.startswith("/"):
        workdir = "/" + workdir
    return dataclasses.replace(config, workdir=workdir)


async def _lines(reader: asyncio.StreamReader, *, whole: bool) -> AsyncIterator[str]:
    """Lines of a program, harmless and short; a carriage return ends one too."""
    limit = 2 * MIB if whole else 4 * LINE_CHARACTERS
    rest = b""
    while piece := await reader.read(65_536):
        *lines, rest = (rest + piece).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            if text := _plain(line[:limit], whole=whole):
                yield text
        rest = rest[:limit]
    if text := _plain(rest, whole=whole):
        yield text


def _plain(line: bytes, *, whole: bool) -> str:
    text = line.decode(errors="replace").strip()
    if whole:
        return text
    if found := _MESSAGE.search(text):
        text = found[1].replace('\\"', '"')
    # Addresses that a registry redirects to carry their key in the query.
    return "".join(character if character.isprintable() else " " for character in _QUERY.sub("?…", text)).strip()


def _key(kind: str, digest: str) -> str:
    return hashlib.sha256(f"{RECIPE_VERSION} {platform.machine()} {kind} {digest}".encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
