"""Snapshots that are images."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    with op.batch_alter_table("snapshots") as snapshots:
        snapshots.alter_column("instance_id", existing_type=sa.Uuid(), nullable=True)
        snapshots.alter_column("driver", existing_type=sa.Text(), nullable=True)
        snapshots.add_column(sa.Column("oci_image", sa.Text()))
        snapshots.add_column(sa.Column("env_sealed", sa.LargeBinary()))
