"""Volumes, their checkpoints, and which instances have them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "volumes",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("host_id", sa.Uuid(), nullable=False),
        sa.Column("checkpoint_of", sa.Uuid()),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("size_mb", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("lock_token", sa.Uuid()),
        sa.Column("lock_expires_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_volumes"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_volumes_organization_id_organizations"
        ),
        sa.ForeignKeyConstraint(["checkpoint_of"], ["volumes.id"], name="fk_volumes_checkpoint_of_volumes"),
    )
    op.create_index("ix_volumes_organization_id_id", "volumes", ["organization_id", "id"])
    op.create_index("ix_volumes_host_id", "volumes", ["host_id"])
    op.create_index("ix_volumes_checkpoint_of_id", "volumes", ["checkpoint_of", "id"])
    op.create_table(
        "volume_mounts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("instance_id", sa.Uuid(), nullable=False),
        sa.Column("volume_id", sa.Uuid(), nullable=False),
        sa.Column("checkpoint_id", sa.Uuid()),
        sa.Column("disk_id", sa.Uuid(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("read_only", sa.Boolean(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_volume_mounts"),
        sa.ForeignKeyConstraint(
            ["instance_id"], ["instances.id"], name="fk_volume_mounts_instance_id_instances", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["volume_id"], ["volumes.id"], name="fk_volume_mounts_volume_id_volumes"),
        sa.ForeignKeyConstraint(["checkpoint_id"], ["volumes.id"], name="fk_volume_mounts_checkpoint_id_volumes"),
    )
    op.create_index("ix_volume_mounts_instance_id_disk_id", "volume_mounts", ["instance_id", "disk_id"], unique=True)
    op.create_index("ix_volume_mounts_volume_id", "volume_mounts", ["volume_id"])
    op.create_index("ix_volume_mounts_disk_id", "volume_mounts", ["disk_id"])
    op.add_column("snapshots", sa.Column("volumes", sa.JSON(), nullable=False, server_default="[]"))
