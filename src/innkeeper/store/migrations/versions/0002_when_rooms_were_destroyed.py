"""When an instance was destroyed, so that its row can go some day."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.add_column("instances", sa.Column("destroyed_at", sa.DateTime(timezone=True)))
    # Nobody knows when the old ones were: their time begins now.
    op.execute("UPDATE instances SET destroyed_at = CURRENT_TIMESTAMP WHERE state = 'destroyed'")
    op.create_index("ix_instances_destroyed_at", "instances", ["destroyed_at"])
