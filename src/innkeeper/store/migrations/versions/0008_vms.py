"""VMs and sessions: further handles on instances, and what happened to each VM."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "sessions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("env_sealed", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_sessions_organization_id_organizations"
        ),
    )
    op.create_index("ix_sessions_organization_id_id", "sessions", ["organization_id", "id"])
    op.create_index("ix_sessions_created_at", "sessions", ["created_at"])
    op.create_table(
        "vms",
        sa.Column("instance_id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("lifetime_seconds", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("memory_mb", sa.Integer(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("image_variant", sa.Text()),
        sa.Column("idle_seconds", sa.Integer()),
        sa.Column("env_sealed", sa.LargeBinary()),
        sa.Column("hold_until", sa.DateTime(timezone=True)),
        sa.Column("hold_reason", sa.Text()),
        sa.Column("end_reason", sa.Text()),
        sa.PrimaryKeyConstraint("instance_id", name="pk_vms"),
        sa.ForeignKeyConstraint(["instance_id"], ["instances.id"], name="fk_vms_instance_id_instances"),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"], name="fk_vms_organization_id_organizations"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_vms_session_id_sessions"),
    )
    op.create_index("ix_vms_organization_id_instance_id", "vms", ["organization_id", "instance_id"])
    op.create_index("ix_vms_session_id", "vms", ["session_id"])
    op.create_table(
        "vm_events",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("instance_id", sa.Uuid(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_vm_events"),
        sa.ForeignKeyConstraint(["instance_id"], ["vms.instance_id"], name="fk_vm_events_instance_id_vms"),
    )
    op.create_index("ix_vm_events_instance_id_id", "vm_events", ["instance_id", "id"])
