"""The Gentity dialect: docs/api/gentity.md."""
