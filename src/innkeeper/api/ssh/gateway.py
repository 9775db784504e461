"""The SSH gateway: takes connections while there is room for them, and hands each to asyncssh."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import asyncssh
import structlog

from innkeeper.api.ssh import host_key
from innkeeper.api.ssh.connection import Connection
from innkeeper.api.ssh.limits import ConnectionLimits, Place
from innkeeper.api.ssh.login import Client
from innkeeper.control.context import Control

log = structlog.stdlib.get_logger(__name__)

# What every OpenSSH since 6.5 (2014) speaks. Diffie-Hellman in groups of integers would cost the event loop tens of milliseconds; a client that compresses
# could send a thousand times what it pays for.
KEY_EXCHANGES = ("curve25519-sha256", "curve25519-sha256@libssh.org", "ecdh-sha2-nistp256", "ecdh-sha2-nistp384", "ecdh-sha2-nistp521")  # fmt: skip
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes128-ctr", "aes256-ctr")  # fmt: skip
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512")
SOFT_SIGNATURES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "rsa-sha2-512", "rsa-sha2-256")  # fmt: skip
# Of keys in hardware too.
SIGNATURES = (*SOFT_SIGNATURES, "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com")
KEEPALIVE_SECONDS = 30
# After an error of accept(): most likely no descriptor is left, and to ask again at once would be to spin.
ACCEPT_PAUSE_SECONDS = 0.1
CLOSE_SECONDS = 1.0


@asynccontextmanager
async def ssh_gateway(control: Control, listener: socket.socket) -> AsyncIterator[None]:
    """Serve SSH on a listening socket, which is closed at the end, with every connection. Raises OSError, ValueError when the host key cannot be used."""
    settings = control.settings
    options = await asyncssh.SSHServerConnectionOptions.construct(
        config=None,
        server_host_keys=[asyncssh.import_private_key(host_key.private_key(settings.api_dir))],
        kex_algs=KEY_EXCHANGES,
        encryption_algs=CIPHERS,
        mac_algs=MACS,
        compression_algs=("none",),
        signature_algs=SIGNATURES,
        public_key_auth=True,
        password_auth=False,
        kbdint_auth=False,
        host_based_auth=False,
        gss_host=None,
        agent_forwarding=False,
        x11_forwarding=False,
        login_timeout=settings.ssh_login_seconds,
        keepalive_interval=KEEPALIVE_SECONDS,
        server_version="Innkeeper",
    )
    gateway = Gateway(control, options)
    listener.setblocking(False)
    accepting = asyncio.get_running_loop().create_task(gateway.accept(listener))
    try:
        yield
    finally:
        accepting.cancel()
        await asyncio.wait([accepting])
        listener.close()
        await gateway.close()


class Gateway:
    """The connections that there are."""

    def __init__(self, control: Control, options: asyncssh.SSHServerConnectionOptions) -> None:
        self._control = control
        self._options = options
        settings = control.settings
        self._limits = ConnectionLimits(settings.ssh_connections, settings.ssh_connections_per_address)
        self._open: set[Connection] = set()

    async def accept(self, listener: socket.socket) -> None:
        """Take connections until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                taken, address = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("no SSH connection can be taken", error=str(error))
                await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            place = self._limits.enter(address[0])
            if place is None:
                self._control.metrics.ssh_turned_away += 1
                taken.close()
                continue
            try:
                await loop.connect_accepted_socket(partial(self._connection, place, address[0]), taken)
            except OSError:
                # It was gone before it came.
                place.leave()
                taken.close()

    def _connection(self, place: Place, address: str) -> Connection:
        connection = Connection(
            asyncio.get_running_loop(),
            self._options,
            Client(self._control, place, address),
            stall_seconds=self._control.settings.client_timeout_seconds,
        )
        self._open.add(connection)
        watching = asyncio.get_running_loop().create_task(connection.wait_closed())
        watching.add_done_callback(lambda _: self._open.discard(connection))
        return connection

    async def close(self) -> None:
        """Take leave of every client."""
        leaving = list(self._open)
        for connection in leaving:
            connection.disconnect(asyncssh.DISC_BY_APPLICATION, "The server is being stopped")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(*(connection.wait_closed() for connection in leaving))
        for connection in list(self._open):
            connection.abort()
