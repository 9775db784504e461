"""What `apt` and other installers need in the tests' own internet: a repository with one package, and an image that has them all and trusts it."""

from __future__ import annotations

import hashlib
import io
import subprocess
from pathlib import Path

from tests.integration import oci_fixture as oci
from tests.integration.image_fixture import shipped_image

SUITE = "trixie"
COMPONENT = "main"
APT_HOST = "debian.test"
SOURCES = f"deb [trusted=yes] http://{APT_HOST}/debian {SUITE} {COMPONENT}\n".encode()
ARCHITECTURE = oci.HERE
AUTHORITIES = "etc/ssl/certs/ca-certificates.crt"
# What no installer of the tests runs, and what would only make the image larger.
LEFT_OUT = (
    "./.innkeeper", "./usr/include", "./usr/lib/gcc", "./usr/libexec/gcc", "./usr/share/perl", "./usr/share/doc", "./usr/share/man",
    "./usr/share/locale", "./usr/share/info", "./usr/share/zoneinfo", "./usr/share/bash-completion", "./usr/lib/*-linux-gnu/*.a",
)  # fmt: skip
# In a mount namespace of its own: however it ends, nothing stays mounted.
TAR_SCRIPT = 'mount -t erofs -o ro,loop "$1" /mnt && shift && exec tar --create --numeric-owner --directory /mnt "$@" .'


def apt_repository() -> dict[str, bytes]:
    """A repository whose one package, `tinydeb`, has a program of that name: {host and path: content}."""
    fields = {
        "Package": "tinydeb",
        "Version": "1.0-2",
        "Architecture": ARCHITECTURE,
        "Maintainer": "Tests <tests@localhost>",
        "Description": "a tiny package",
    }
    control = "".join(f"{name}: {value}\n" for name, value in fields.items())
    package = _deb(control.encode(), {"usr/bin/tinydeb": b"#!/bin/sh\necho hello from a deb\n"})
    pool = "pool/tinydeb_1.0-2.deb"
    packages = f"{control}Filename: {pool}\nSize: {len(package)}\nSHA256: {hashlib.sha256(package).hexdigest()}\n\n"
    listing = f"{COMPONENT}/binary-{ARCHITECTURE}/Packages"
    release = (
        f"Suite: {SUITE}\nCodename: {SUITE}\nDate: Sat, 01 Mar 2025 10:00:00 UTC\nArchitectures: {ARCHITECTURE}\nComponents: {COMPONENT}\n"
        f"SHA256:\n {hashlib.sha256(packages.encode()).hexdigest()} {len(packages)} {listing}\n"
    )
    return {
        f"{APT_HOST}/debian/dists/{SUITE}/Release": release.encode(),
        f"{APT_HOST}/debian/dists/{SUITE}/{listing}": packages.encode(),
        f"{APT_HOST}/debian/{pool}": package,
    }


def _deb(control: bytes, programs: dict[str, bytes]) -> bytes:
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar": oci.layer([("./control", oci.file(control))]),
        "data.tar": oci.layer([(f"./{path}", oci.file(content, mode=0o755)) for path, content in programs.items()]),
    }
    out = io.BytesIO(b"!<arch>\n")
    out.seek(0, io.SEEK_END)
    for name, content in parts.items():
        out.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
        out.write(content + b"\n" * (len(content) % 2))
    return out.getvalue()


def installers_layout(folder: Path, ca_pem: bytes) -> Path:
    """An OCI layout of the shipped image `node`, less what nothing needs: apt, Python with pip, Node.js with npm, git. It trusts `ca_pem` alone."""
    options = ["--sort=name", *(f"--exclude={path}" for path in LEFT_OUT)]
    argv = ["unshare", "--mount", "sh", "-c", TAR_SCRIPT, "sh", str(shipped_image("node").path), *options]
    done = subprocess.run(argv, capture_output=True, check=True)
    over = oci.layer(
        [
            (AUTHORITIES, oci.file(ca_pem)),
            ("etc/apt/sources.list", oci.file(SOURCES)),
            ("etc/apt/sources.list.d/.wh..wh..opq", oci.file()),
        ]
    )
    layout = oci.Layout()
    image = layout.image([done.stdout, over], {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]}, compressed=False)
    return layout.index(image).write(folder / "installers")
