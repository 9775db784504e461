"""Fixtures that security tests share."""

from tests.integration.daemon_fixture import anyio_backend

__all__ = ["anyio_backend"]
