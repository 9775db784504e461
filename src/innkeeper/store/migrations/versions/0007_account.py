"""What an account shows: its keys by number, SSH keys, and what its guests used."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.add_column("tokens", sa.Column("number", sa.Integer(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE tokens SET number = (SELECT count(*) FROM tokens AS older"
        " WHERE older.organization_id = tokens.organization_id AND older.id <= tokens.id)"
    )
    with op.batch_alter_table("tokens") as tokens:
        tokens.alter_column("number", server_default=None)
        tokens.drop_index("ix_tokens_organization_id")
        tokens.create_index("ix_tokens_organization_id_number", ["organization_id", "number"], unique=True)
    op.create_table(
        "ssh_keys",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("organization_id", "number", name="pk_ssh_keys"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_ssh_keys_organization_id_organizations"
        ),
    )
    op.create_table(
        "usage",
        sa.Column("machine_id", sa.Text(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("instance_id", sa.Uuid(), nullable=False),
        sa.Column("cpu_us", sa.BigInteger(), nullable=False),
        sa.Column("memory_mib_seconds", sa.Float(), nullable=False),
        sa.Column("merged", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("machine_id", "day", name="pk_usage"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_usage_organization_id_organizations"
        ),
    )
    op.create_index("ix_usage_organization_id_day", "usage", ["organization_id", "day"])
    op.create_index("ix_usage_instance_id", "usage", ["instance_id"])
    op.create_index("ix_usage_day", "usage", ["day"])
