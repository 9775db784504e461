"""Rows about the SSH gateway, by OpenSSH's client: a whole login with a command, and a command over a connection that is there."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from bench.rows import Row
from bench.server import RefusedError, Server

MEMORY_MB = 512


def measure(server: Server, *, tries: int) -> list[Row]:
    """`true` in a VM, with a connection of its own each time and over one that is kept."""
    login = Row("SSH login", "`ssh VM true`, a connection of its own each time")
    again = Row("SSH exec", "`ssh VM true` over a connection that is there")
    with tempfile.TemporaryDirectory(prefix="bench-ssh") as folder:
        key, control = Path(folder, "id"), Path(folder, "control")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        number = server.request("POST", "/v1/ssh-keys", {"public_key": key.with_suffix(".pub").read_text()})["id"]
        vm = server.request("POST", "/v1/vms?wait=true", {"memory_mb": MEMORY_MB, "vm_lifetime_seconds": 3600})["vm_id"]
        options = ("IdentitiesOnly=yes", "BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")  # fmt: skip
        ssh = ["ssh", "-F", "none", "-p", str(server.ssh_port), "-i", str(key), *(f"-o{option}" for option in options)]
        target = f"{vm}@127.0.0.1"
        shared = [*ssh, "-S", str(control)]
        try:
            _run([*shared, "-M", "-f", "-N", "-o", "ControlPersist=yes", target])
            for _ in range(tries):
                login.take(lambda: _run([*ssh, target, "true"]))
                again.take(lambda: _run([*shared, target, "true"]))
        finally:
            subprocess.run([*shared, "-O", "exit", target], capture_output=True, check=False)
            server.request("DELETE", f"/v1/vms/{vm}")
            server.request("DELETE", f"/v1/ssh-keys/{number}")
    return [login, again]


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    if done.returncode:
        raise RefusedError(done.stderr.decode(errors="replace"))
