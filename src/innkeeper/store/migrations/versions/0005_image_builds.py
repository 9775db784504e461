"""Builds of images, the newest of each organization."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "image_builds",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("error", sa.Text()),
        sa.Column("digest", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_image_builds"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_image_builds_organization_id_organizations"
        ),
    )
    op.create_index("ix_image_builds_organization_id_id", "image_builds", ["organization_id", "id"])
    op.create_index("ix_image_builds_status", "image_builds", ["status"])
