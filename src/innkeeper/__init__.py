"""Innkeeper: isolated guest computers for AI agents, on your own Linux machines."""

__version__ = "0.1.0"
