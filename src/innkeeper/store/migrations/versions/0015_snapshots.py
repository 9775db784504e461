"""Snapshots of VMs, and what VMs begin with and leave behind."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "snapshots",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("instance_id", sa.Uuid(), nullable=False),
        sa.Column("host_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("memory", sa.Boolean(), nullable=False),
        sa.Column("driver", sa.Text(), nullable=False),
        sa.Column("image", sa.Text(), nullable=False),
        sa.Column("image_digest", sa.Text(), nullable=False),
        sa.Column("image_config", sa.JSON()),
        sa.Column("vcpu_count", sa.Integer(), nullable=False),
        sa.Column("memory_mb", sa.Integer(), nullable=False),
        sa.Column("disk_mb", sa.Integer(), nullable=False),
        sa.Column("egress_policy", sa.JSON(), nullable=False),
        sa.Column("parent_id", sa.Uuid()),
        sa.Column("disk_bytes", sa.BigInteger()),
        sa.Column("memory_bytes", sa.BigInteger()),
        sa.Column("downtime_ms", sa.Float()),
        sa.Column("error", sa.Text()),
        sa.Column("lock_token", sa.Uuid()),
        sa.Column("lock_expires_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_snapshots"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_snapshots_organization_id_organizations"
        ),
    )
    op.create_index("ix_snapshots_organization_id_id", "snapshots", ["organization_id", "id"])
    op.create_index("ix_snapshots_host_id", "snapshots", ["host_id"])
    op.add_column("vms", sa.Column("snapshot_id", sa.Uuid()))
    op.add_column("vms", sa.Column("restored", sa.Text()))
    op.add_column("vms", sa.Column("snapshot_on_terminate", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("vms", sa.Column("snapshot_name", sa.Text()))
    op.create_index("ix_vms_snapshot_id", "vms", ["snapshot_id"])
