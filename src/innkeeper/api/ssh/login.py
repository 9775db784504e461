"""What a client may do: show a key of the organization whose VM it names, and then open sessions and forward connections. Nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import asyncssh
import structlog

from innkeeper.api.ssh.connection import Connection, ForwardChannel, SessionChannel
from innkeeper.api.ssh.forward import LOOPBACK, PORTS, Forward
from innkeeper.api.ssh.limits import Place
from innkeeper.api.ssh.session import Session
from innkeeper.control import ssh_logins
from innkeeper.control.context import Control
from innkeeper.control.ssh_logins import SshLogin

log = structlog.stdlib.get_logger(__name__)

# As sshd: an agent may offer that many keys that are not ours.
TRIES = 6
CHANNELS = 32


class Client(asyncssh.SSHServer):
    """One client, from its connection to its end."""

    def __init__(self, control: Control, place: Place, address: str) -> None:
        self._control = control
        self._place = place
        self._address = address
        self._connection: Connection | None = None
        self._login: SshLogin | None = None
        self._tries = TRIES
        self._in = False
        self._watcher: asyncio.Task[None] | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        """The client has connected."""
        assert isinstance(conn, Connection)  # noqa: S101 - the gateway makes no others
        self._connection = conn

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._place.leave()
        self._give_back()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._in and self._login is not None:
            ssh_logins.note_logout(self._control, self._login)

    # --- who it is -----------------------------------------------------------------------------------------------------

    def begin_auth(self, username: str) -> bool:
        """Everybody has to show a key, whatever VM they name."""
        return True

    def public_key_auth_supported(self) -> bool:
        """Keys are all there is."""
        return True

    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        """Whether the key opens the VM; asked before the client has proved that it has the key, and again with the proof."""
        login = await ssh_logins.admit(self._control, username, key.get_fingerprint())
        self._give_back()
        self._login = login
        if login is None:
            self._control.metrics.ssh_refusals += 1
            self._tries -= 1
            if self._tries <= 0:
                raise asyncssh.DisconnectError(
                    asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "Too many authentication failures"
                )
            return False
        # From now on, not from its end on: no removal may fall in between.
        self._control.ssh_keys_in_use.hold(login.principal.organization_id, login.key_number, self._removed)
        return True

    def auth_completed(self) -> None:
        """The client is who it says."""
        assert self._login is not None and self._connection is not None  # noqa: S101 - by its key
        self._in = True
        self._place.known()
        self._connection.known()
        ssh_logins.note_login(self._control, self._login, self._address)
        self._watcher = asyncio.get_running_loop().create_task(self._until_vm_ends(self._login))

    def _give_back(self) -> None:
        if self._login is not None:
            self._control.ssh_keys_in_use.let_go(
                self._login.principal.organization_id, self._login.key_number, self._removed
            )

    def _removed(self) -> None:
        if self._connection is not None:
            log.info("an SSH connection ends with its key")
            self._connection.abort()

    async def _until_vm_ends(self, login: SshLogin) -> None:
        await ssh_logins.until_vm_ends(login)
        if self._connection is not None:
            self._connection.disconnect(asyncssh.DISC_BY_APPLICATION, "The VM has ended")

    # --- what it wants ---------------------------------------------------------------------------------------------------

    def session_requested(self) -> tuple[SessionChannel, Session]:
        """A session. Raises ChannelOpenError for one too many."""
        connection, login = self._admitted()
        return SessionChannel(connection), Session(self._control, login, connection)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> tuple[ForwardChannel, Awaitable[Forward]]:
        """A connection to the guest's own loopback. Raises ChannelOpenError for any other."""
        connection, login = self._admitted()
        if dest_host not in LOOPBACK or dest_port not in PORTS:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED,
                "Only ports of the VM's own loopback (localhost) can be forwarded",
            )
        return ForwardChannel(connection), Forward(self._control, login, connection, dest_port).open()

    def _admitted(self) -> tuple[Connection, SshLogin]:
        connection, login = self._connection, self._login
        if connection is None or login is None or not self._in:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "Not logged in")
        if connection.channel_count >= CHANNELS:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_RESOURCE_SHORTAGE, f"A connection has at most {CHANNELS} channels"
            )
        return connection, login
