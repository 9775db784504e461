"""OCI images for tests, made byte by byte so that they can be as wrong as a stranger's."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.integration.daemon_fixture import Host

from innkeeper.bus.contract import Message
from innkeeper.core.host_verbs import ImportImage, to_wire

DIRECTORY, SYMLINK, HARD_LINK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
HERE = MACHINES[platform.machine()]
NEEDS_TOOLS = shutil.which("skopeo") is None or shutil.which("umoci") is None
Entry = tuple[str, dict[str, Any]]

# A shell-less image's whole content: a program that prints who and where it is, in Go, static.
PROGRAM = """package main

import (
	"fmt"
	"os"
)

func main() {
	directory, _ := os.Getwd()
	fmt.Printf("uid=%d gid=%d cwd=%s A=%s args=%v\\n", os.Getuid(), os.Getgid(), directory, os.Getenv("A"), os.Args[1:])
	_ = os.WriteFile("/tmp/made", []byte("x"), 0o644)
}
"""


def layer(entries: Iterable[Entry]) -> bytes:
    """A layer of (name, attributes of tarfile.TarInfo and `data`)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, attributes in entries:
            information = tarfile.TarInfo(name)
            data = attributes.pop("data", None)
            for key, value in attributes.items():
                setattr(information, key, value)
            if data is not None:
                information.size = len(data)
            archive.addfile(information, None if data is None else io.BytesIO(data))
    return out.getvalue()


def file(data: bytes = b"", **attributes: Any) -> dict[str, Any]:
    return {"data": data, "mode": 0o644, **attributes}


def folder(**attributes: Any) -> dict[str, Any]:
    return {"type": DIRECTORY, "mode": 0o755, **attributes}


def sparse_entry(name: str, size: int) -> bytes:
    """An old GNU sparse file: 512 bytes in the archive, `size` when it is unpacked."""
    information = tarfile.TarInfo(name)
    block = bytearray(information.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = b"S"
    block[386:398] = b"%011o\0" % size
    block[398:410] = b"%011o\0" % 0
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@dataclass
class Layout:
    """An OCI layout in memory: path -> content."""

    files: dict[str, bytes] = field(default_factory=lambda: {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'})

    def blob(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.files[f"blobs/sha256/{digest}"] = content
        return f"sha256:{digest}"

    def image(
        self, layers: list[bytes], config: dict[str, Any] | None = None, *, architecture: str = HERE, compressed: bool = True
    ) -> dict[str, Any]:  # fmt: skip
        """The descriptor of an image of these layers."""
        kind = "application/vnd.oci.image.{}.v1{}"
        rows, sums = [], []
        for content in layers:
            sums.append("sha256:" + hashlib.sha256(content).hexdigest())
            packed = gzip.compress(content, mtime=0) if compressed else content
            media = kind.format("layer", ".tar+gzip" if compressed else ".tar")
            rows.append({"mediaType": media, "digest": self.blob(packed), "size": len(packed)})
        about = {
            "architecture": architecture,
            "os": "linux",
            "created": "2024-01-02T03:04:05.678901234Z",
            "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": sums},
        }
        described = json.dumps(about).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": kind.format("manifest", "+json"),
            "config": {
                "mediaType": kind.format("config", "+json"),
                "digest": self.blob(described),
                "size": len(described),
            },
            "layers": rows,
        }
        text = json.dumps(manifest).encode()
        return {
            "mediaType": kind.format("manifest", "+json"),
            "digest": self.blob(text),
            "size": len(text),
            "platform": {"architecture": architecture, "os": "linux"},
        }

    def several(self, *images: dict[str, Any]) -> dict[str, Any]:
        """The descriptor of an index of images for several architectures."""
        kind = "application/vnd.oci.image.index.v1+json"
        text = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": list(images)}).encode()
        return {"mediaType": kind, "digest": self.blob(text), "size": len(text)}

    def index(self, *descriptors: dict[str, Any]) -> Layout:
        """The layout with an index of these images."""
        index = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": list(descriptors),
        }
        self.files["index.json"] = json.dumps(index).encode()
        return self

    def archive(self) -> bytes:
        """The oci-archive of it."""
        return layer([(name, file(content)) for name, content in self.files.items()])

    def write(self, directory: Path) -> Path:
        for name, content in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return directory


def oci_archive(layers: list[bytes], config: dict[str, Any] | None = None, **more: Any) -> bytes:
    """An oci-archive of one image."""
    layout = Layout()
    return layout.index(layout.image(layers, config, **more)).archive()


def program(directory: Path) -> bytes:
    """The static program of PROGRAM."""
    (directory / "go.mod").write_text("module probe\n\ngo 1.19\n")
    (directory / "main.go").write_text(PROGRAM)
    command = ["go", "build", "-trimpath", "-ldflags", "-s -w", "-o", "probe", "."]
    subprocess.run(command, cwd=directory, env={**os.environ, "CGO_ENABLED": "0"}, check=True)
    return (directory / "probe").read_bytes()


def musl_archive(directory: Path) -> bytes:
    """The oci-archive of an image with musl's loader and C library, a user `app`, and a shell of a few words linked with it. Skips where there is no musl."""
    loader = Path(f"/lib/ld-musl-{platform.machine()}.so.1")
    if not loader.exists() or shutil.which("musl-gcc") is None:
        pytest.skip("there is no musl here: make test installs it")
    shell = directory / "musl-shell"
    subprocess.run(["musl-gcc", "-O1", "-o", shell, Path(__file__).parents[1] / "musl_shell" / "main.c"], check=True)
    entries = [
        (f"lib/{loader.name}", file(loader.read_bytes(), mode=0o755)),
        ("bin/sh", file(shell.read_bytes(), mode=0o755)),
        ("etc/passwd", file(b"root:x:0:0::/:/bin/sh\napp:x:500:500::/:/bin/sh\n")),
    ]
    return oci_archive([layer(entries)])


@dataclass
class Imported:
    """What an import said and made."""

    made: dict[str, Any]
    steps: list[str]
    lines: list[str]
    seconds: float

    @property
    def digest(self) -> str:
        return str(self.made["digest"])


async def run_import(
    host: Host, request: ImportImage, pieces: Iterable[bytes] = (), *, acknowledge: bool = True
) -> Imported:
    """Import on a host over the bus, as the control side does. Raises the import's error."""
    began = time.monotonic()
    steps: list[str] = []
    lines: list[str] = []
    made: dict[str, Any] = {}
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        feeding = asyncio.ensure_future(_feed(call, pieces)) if request.reference is None else None
        try:
            async for event in call.events():
                assert isinstance(event, Message)
                steps += [event.body["step"]] if "step" in event.body else []
                lines += [event.body["line"]] if "line" in event.body else []
                if "made" in event.body:
                    made = event.body["made"]
                    if not acknowledge:
                        break
                    await call.send_end()
            else:
                await call.result()
        finally:
            if feeding is not None:
                feeding.cancel()
    return Imported(made, steps, lines, time.monotonic() - began)


async def _feed(call: Any, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        for at in range(0, len(piece), 262_144):
            await call.send_data(piece[at : at + 262_144])
    await call.send_message({"sent": True})


async def import_archive(host: Host, content: bytes, kind: str = "oci-archive") -> Imported:
    return await run_import(host, ImportImage(kind), [content])


async def import_reference(host: Host, reference: str, username: str | None = None, password: str | None = None) -> Imported:  # fmt: skip
    return await run_import(host, ImportImage("registry", reference, username, password))
