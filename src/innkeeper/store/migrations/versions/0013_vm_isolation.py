"""How VMs ask to be isolated."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.add_column("vms", sa.Column("driver", sa.Text()))
    op.add_column("vms", sa.Column("min_isolation", sa.Text()))
