"""Fixtures that integration tests share: a real daemon, one per module, an instance per test; an overlay with a scanner."""

from tests.integration.daemon_fixture import anyio_backend, host, instance
from tests.integration.scanned_guest import agent, guest, scanner, store

__all__ = ["agent", "anyio_backend", "guest", "host", "instance", "scanner", "store"]
