"""VMs that are suspended, by whom they are woken, and what they want of that."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.add_column("vms", sa.Column("auto_suspend", sa.Boolean()))
    op.add_column("vms", sa.Column("auto_resume", sa.Boolean()))
    op.add_column("vms", sa.Column("suspend_reason", sa.Text()))
    op.add_column("vms", sa.Column("woken_by", sa.Text()))
