"""Who organizations are at registries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "registry_credentials",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("registry", sa.Text(), nullable=False),
        sa.Column("username", sa.Text(), nullable=False),
        sa.Column("password_sealed", sa.LargeBinary(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_registry_credentials"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_registry_credentials_organization_id_organizations"
        ),
        sa.UniqueConstraint("organization_id", "registry", name="uq_registry_credentials_organization_id_registry"),
    )
