"""The way to the server: the unix socket in its state directory, or an address and a token. Speaks HTTP and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote, urlsplit

import typer

from innkeeper.cli.printing import FAILED, UNREACHABLE, USAGE, fail, note
from innkeeper.settings_file import home_of

if TYPE_CHECKING:
    import httpx2
    from websockets.asyncio.client import connect as Connect  # noqa: N812 - the class of a connection that is being opened

CONNECT_SECONDS = 5.0
# Making a room may take as long as the server's room_wait_seconds allows.
READ_SECONDS = 660.0


@dataclass(frozen=True, slots=True)
class Target:
    """Which server, and as whom: the options in front of the command."""

    home: Path | None
    url: str | None
    token_file: Path | None

    @property
    def socket(self) -> Path:
        """The unix socket in the state directory: the one named, else the settings file's, else the default one."""
        try:
            home = self.home or home_of(None)
        except ValueError as error:
            fail(error, status=USAGE)
        return home / "api" / "inn.sock"

    def token(self) -> str | None:
        """The token from the file, else from the environment. Never an option: others can read a command line."""
        if self.token_file is None:
            return os.environ.get("INNKEEPER_TOKEN", "").strip() or None
        try:
            token = self.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read the token from {self.token_file}: {error}", status=USAGE)
        if not token.isascii() or not token.isprintable() or " " in token:
            fail(f"{self.token_file} does not hold one token and nothing else", status=USAGE)
        return token or None


class Server:
    """A connection. Every method ends the command with the server's own message when the server refuses."""

    def __init__(self, client: httpx2.Client, where: str, *, socket: Path | None = None) -> None:
        self._client = client
        self._where = where
        self._socket = socket

    def get(self, path: str, **query: str | int | None) -> Any:
        """The JSON answer of a GET; query values that are None are left out."""
        return self.call("GET", path, query=query)

    def call(
        self, method: str, path: str, body: Any = None, *, query: Mapping[str, str | int | None] | None = None
    ) -> Any:
        """The JSON answer, None where there is none."""
        params = {name: value for name, value in (query or {}).items() if value is not None}
        with self.reaching():
            response = self._client.request(method, path, json=body, params=params or None)
        if response.is_error:
            refused(response)
        if response.status_code == 204 or not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            fail(f"{self._where} does not answer as an Innkeeper server does")

    @contextmanager
    def stream(self, method: str, path: str, **request: Any) -> Iterator[httpx2.Response]:
        """A response whose body is read as it comes, whatever its status."""
        with self.reaching(), self.raw_stream(method, path, **request) as response:
            yield response

    def raw_stream(self, method: str, path: str, **request: Any) -> AbstractContextManager[httpx2.Response]:
        """The same for one who tries again: errors of the transport are raised as httpx2's."""
        return self._client.stream(method, path, **request)

    def websocket(self, path: str, *, open_timeout: float) -> Connect:
        """A WebSocket of the server, to be entered as an asynchronous context."""
        from websockets.asyncio.client import connect as open_websocket
        from websockets.asyncio.client import unix_connect

        headers = {name: value for name, value in self._client.headers.items() if name == "authorization"}
        options: dict[str, Any] = {
            "additional_headers": headers,
            "compression": None,
            "max_size": None,
            "open_timeout": open_timeout,
            "user_agent_header": "inn",
        }
        if self._socket is not None:
            return unix_connect(str(self._socket), f"ws://innkeeper{path}", **options)
        url = self._client.base_url
        scheme = "wss" if url.scheme == "https" else "ws"
        prefix = url.raw_path.decode().rstrip("/")
        return open_websocket(f"{scheme}://{url.netloc.decode()}{prefix}{path}", **options)

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Turn transport errors into a sentence and an exit status."""
        import httpx2

        try:
            yield
        except httpx2.ConnectError as error:
            fail(
                f"no server answers at {self._where} ({error}): is the server running? Start it with: inn serve",
                status=UNREACHABLE,
            )
        except httpx2.TimeoutException:
            fail(f"{self._where} does not answer in time", status=UNREACHABLE)
        except httpx2.TransportError as error:
            fail(f"the connection to {self._where} broke: {str(error) or type(error).__name__}")
        except httpx2.InvalidURL as error:
            fail(f"{self._where}: {error}", status=USAGE)

    def profile_id(self, name_or_id: str) -> str:
        """The id of a profile given by name or id."""
        profiles: list[dict[str, Any]] = self.get("/api/profiles")
        # A name may look like an id, so names win; ids are compared in any case.
        for field, wanted in (("name", name_or_id), ("id", name_or_id.lower())):
            for profile in profiles:
                if profile[field] == wanted:
                    return str(profile["id"])
        fail(f"there is no profile '{name_or_id}': see inn profile list")

    def organization_id(self, name: str | None) -> str | None:
        """The id of an organization given by name, None for one's own. Only the operator may ask."""
        if name is None:
            return None
        for organization in self.get("/v1/organizations"):
            if organization["name"] == name:
                return str(organization["id"])
        fail(f"there is no organization '{name}': see inn organization list")

    def host(self, name_or_id: str | None) -> dict[str, Any]:
        """The row of the host of a name or id; without one, of the only host there is."""
        hosts: list[dict[str, Any]] = self.get("/v1/hosts")
        found = [one for one in hosts if name_or_id in (None, one["name"], one["id"])]
        if len(found) == 1:
            return found[0]
        if not found:
            fail(f"there is no host '{name_or_id}': see inn host list" if name_or_id else "there is no host yet")
        fail("there are several hosts: name one by its id (inn host list)")

    def room_path(self, profile: str, room: str) -> str:
        """The path of a room; the profile by name or id."""
        return f"/api/profile/{self.profile_id(profile)}/room/{encode_segment(room)}"


def encode_segment(text: str) -> str:
    """One path segment, percent-encoded whole: also dots, so that no client or proxy takes `..` for a step up."""
    return quote(text.encode("utf-8", "surrogateescape"), safe="").replace(".", "%2E")


def refused(response: httpx2.Response) -> NoReturn:
    """End the command with the message of an error answer, in whatever shape it comes."""
    response.read()
    message = None
    try:
        body = response.json()
        message = body.get("message") or body.get("detail") or body.get("error")
        if isinstance(message, list):
            first = message[0]
            message = ".".join(map(str, first["loc"][1:])) + f": {first['msg']}" if first["loc"][1:] else first["msg"]
    except (ValueError, AttributeError, LookupError, TypeError):
        pass
    said = message or f"the server answered {response.status_code}"
    if response.status_code == 401:
        said = f"{said.rstrip('.')}: set INNKEEPER_TOKEN, or use --token-file"
    fail(said, status=FAILED)


def connect(ctx: typer.Context) -> Server:
    """The server that the options and the environment name."""
    import httpx2

    target: Target = ctx.obj
    token = target.token()
    headers = {"User-Agent": "inn", **({"Authorization": f"Bearer {token}"} if token else {})}
    timeout = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    if not target.url:
        _check_socket(target.socket)
        transport = httpx2.HTTPTransport(uds=str(target.socket))
        client = httpx2.Client(transport=transport, base_url="http://innkeeper", headers=headers, timeout=timeout)
        where = str(target.socket)
    else:
        parts = urlsplit(target.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            fail(f"'{target.url}' is not an http or https address", status=USAGE)
        if token and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            note(f"inn: warning: the token travels to {parts.hostname} in the clear; use https")
        client = httpx2.Client(base_url=target.url, headers=headers, timeout=timeout)
        where = target.url
    ctx.call_on_close(client.close)
    return Server(client, where, socket=None if target.url else target.socket)


def _check_socket(path: Path) -> None:
    """End the command with the reason when the socket is out of reach; it is a directory entry, so the reason can be exact."""
    try:
        path.stat()
    except PermissionError:
        hint = "you may not use it: run as its owner (sudo), or set INNKEEPER_URL and INNKEEPER_TOKEN"
        fail(f"{path}: {hint}", status=UNREACHABLE)
    except OSError:
        fail(f"no server answers at {path}: is the server running? Start it with: inn serve", status=UNREACHABLE)
