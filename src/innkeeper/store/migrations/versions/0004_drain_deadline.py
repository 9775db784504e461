"""Until when the rooms of a host that is being drained may run commands."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.add_column("hosts", sa.Column("drain_deadline", sa.DateTime(timezone=True)))
