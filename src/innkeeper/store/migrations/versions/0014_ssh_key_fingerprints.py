"""Keys are looked up by what a client of the SSH gateway shows."""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.create_index("ix_ssh_keys_fingerprint", "ssh_keys", ["fingerprint"])
