"""Rows about file content through the API, and the server's memory meanwhile."""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Callable

from bench.peers import Peers
from bench.processes import peak_mb, reset_peak
from bench.rows import Budget, Row
from bench.server import RefusedError, Room, Server

SIZE_MB = 256
PIECE = os.urandom(1_000_000)
PIECES = SIZE_MB
BARE = "/home/user/blob"
MEMORY_SLACK_MB = 16


async def measure(server: Server, peers: Peers, *, tries: int) -> list[Row]:
    """A file of 256 MB up and down; MB are 10^6 bytes."""
    upload = Row("upload", f"upload of {SIZE_MB} MB", "MB/s", Budget(200, at_least=True))
    download = Row("download", f"download of {SIZE_MB} MB", "MB/s", Budget(300, at_least=True))
    replace = Row("upload-replace", f"upload of {SIZE_MB} MB over an existing file", "MB/s", Budget(at_least=True))
    memory = Row(
        "transfer-memory", "server memory gained by a transfer, at its peak", "MB RSS", Budget(MEMORY_SLACK_MB)
    )
    room = Room(server, server.profile("bench-files", warm_pool_size=0), "files")
    room.create()
    for number in range(tries):
        path = f"{room.path}/file/home/user/blob-{number}"
        pids = list(server.processes().values())
        before = [reset_peak(pid) for pid in pids]
        for row in (upload, download):
            began = time.perf_counter()
            try:
                size = server.download(f"{path}?raw=1") if row is download else server.upload(path, PIECE, PIECES)
            except (OSError, RefusedError, http.client.HTTPException) as error:
                row.failures.append(f"{type(error).__name__}: {error}")
                continue
            row.values.append(size / 1e6 / (time.perf_counter() - began))
        await peers.agent.exec(f"rm -f {BARE}")
        began = time.perf_counter()
        size = await peers.agent.write(BARE, PIECE, PIECES)
        upload.peer("bare agent").values.append(size / 1e6 / (time.perf_counter() - began))
        began = time.perf_counter()
        size = await peers.agent.read(BARE)
        download.peer("bare agent").values.append(size / 1e6 / (time.perf_counter() - began))
        memory.values.append(sum(peak_mb(pid) for pid in pids) - sum(before))
        if download.values:
            began = time.perf_counter()
            size = peers.runsc_head(SIZE_MB * 1_000_000)
            download.peer("runsc exec head").values.append(size / 1e6 / (time.perf_counter() - began))
        try:
            began = time.perf_counter()
            replace.values.append(server.upload(path, PIECE, PIECES) / 1e6 / (time.perf_counter() - began))
        except (OSError, RefusedError, http.client.HTTPException) as error:
            replace.failures.append(f"{type(error).__name__}: {error}")
        room.run("rm ~/blob-*")
    room.destroy()
    return [upload, download, replace, memory, *_of_vms(server, tries=tries)]


def _of_vms(server: Server, *, tries: int) -> list[Row]:
    """The same through a VM's endpoints; of /download the bytes of the file count, not those of its base64."""
    made = server.request("POST", "/v1/vms", {"vm_lifetime_seconds": 3_600})
    content = f"/v1/vms/{made['vm_id']}/files/content?path=/root/blob"
    fields = {"session_id": made["session_id"], "remote_path": "/root/blob"}
    session = f"session_id={made['session_id']}"

    def row(name: str, title: str) -> Row:
        return Row(name, f"VM: {title} of {SIZE_MB} MB", "MB/s", Budget(at_least=True))

    # In this order: what is read was written before.
    transfers: tuple[tuple[Row, Callable[[], int]], ...] = (
        (row("vm-upload", "PUT content"), lambda: server.upload(content, PIECE, PIECES)),
        (row("vm-download", "GET content"), lambda: server.download(content)),
        (
            row("vm-download-form", "/download"),
            lambda: server.download_form(f"{session}&filename=/root/blob") * 3 // 4,
        ),
        (row("vm-upload-form", "/upload"), lambda: server.upload_form(fields, PIECE, PIECES)),
    )
    for _ in range(tries):
        for one, transfer in transfers:
            began = time.perf_counter()
            try:
                size = transfer()
            except (OSError, RefusedError, http.client.HTTPException) as error:
                one.failures.append(f"{type(error).__name__}: {error}")
                continue
            one.values.append(size / 1e6 / (time.perf_counter() - began))
        server.request("DELETE", content.replace("/content", ""))
    server.request("DELETE", f"/v1/vms/{made['vm_id']}")
    return [one for one, _ in transfers]
