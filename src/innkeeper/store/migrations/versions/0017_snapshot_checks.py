"""What snapshots are verified by, and what came of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.add_column("snapshots", sa.Column("mark", sa.JSON()))
    op.add_column("snapshots", sa.Column("disk_digest", sa.Text()))
    op.add_column("snapshots", sa.Column("verified_at", sa.DateTime(timezone=True)))
    op.add_column("snapshots", sa.Column("checks", sa.JSON()))
