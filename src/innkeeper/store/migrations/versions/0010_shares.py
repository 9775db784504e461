"""Published ports of instances."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "shares",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("instance_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("is_public", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_shares"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_shares_organization_id_organizations"
        ),
        sa.ForeignKeyConstraint(
            ["instance_id"], ["instances.id"], name="fk_shares_instance_id_instances", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("name", name="uq_shares_name"),
    )
    op.create_index("ix_shares_instance_id", "shares", ["instance_id"])
