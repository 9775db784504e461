"""Fixtures that integration tests share: a real daemon, one per module, and an instance per test."""

from tests.integration.daemon_fixture import anyio_backend, host, instance

__all__ = ["anyio_backend", "host", "instance"]
