"""Snapshots that go with the fork that they are of."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.add_column("snapshots", sa.Column("passing", sa.Boolean(), nullable=False, server_default=sa.false()))
