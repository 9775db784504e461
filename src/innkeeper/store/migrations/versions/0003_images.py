"""Images become objects of organizations, and instances keep the defaults of the image that they were made of."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from innkeeper.ids import uuid7

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    before = op.get_bind().execute(sa.select(_BEFORE)).all()
    op.drop_table("images")
    op.create_table(
        "images",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid()),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("source_ref", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("last_error", sa.Text()),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("tools", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_images"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_images_organization_id_organizations"
        ),
        sa.UniqueConstraint("organization_id", "name", name="uq_images_organization_id_name"),
    )
    op.create_index(
        "ix_images_shipped_name",
        "images",
        ["name"],
        unique=True,
        sqlite_where=sa.text("organization_id IS NULL"),
        postgresql_where=sa.text("organization_id IS NULL"),
    )
    op.add_column("instances", sa.Column("image_config", sa.JSON()))
    if before:
        op.bulk_insert(_AFTER, [_shipped(row) for row in before])


# What the rows were: what a host had reported of its shipped images.
_BEFORE = sa.table(
    "images",
    sa.column("name", sa.Text()),
    sa.column("status", sa.Text()),
    sa.column("digest", sa.Text()),
    sa.column("report", sa.JSON()),
    sa.column("reported_at", sa.DateTime(timezone=True)),
)
_AFTER = sa.table(
    "images",
    sa.column("id", sa.Uuid()),
    sa.column("name", sa.Text()),
    sa.column("digest", sa.Text()),
    sa.column("size_bytes", sa.BigInteger()),
    sa.column("source", sa.Text()),
    sa.column("source_ref", sa.Text()),
    sa.column("status", sa.Text()),
    sa.column("last_error", sa.Text()),
    sa.column("config", sa.JSON()),
    sa.column("tools", sa.JSON()),
    sa.column("created_at", sa.DateTime(timezone=True)),
    sa.column("updated_at", sa.DateTime(timezone=True)),
)


def _shipped(row: Any) -> dict[str, Any]:
    report = row.report
    return {
        "id": uuid7(),
        "name": row.name,
        "digest": row.digest,
        "size_bytes": report.get("size_bytes", 0),
        "source": "shipped",
        "source_ref": row.name,
        "status": row.status,
        "last_error": report.get("message"),
        "config": {name: report[name] for name in ("user", "workdir", "env") if name in report},
        "tools": report.get("tools", []),
        "created_at": row.reported_at,
        "updated_at": row.reported_at,
    }
