"""The tables. Ids are UUIDs, times are UTC; everything works alike on SQLite and PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware datetime in UTC. SQLite has no time zones, so it stores the UTC clock reading and gets the zone back on read."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """The value as the database stores it; a naive one is a bug of the caller."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a stored time needs a time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """The value in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> sa.Column[Any]:
    return sa.Column("id", sa.Uuid(), primary_key=True)


def _organization() -> sa.Column[Any]:
    return sa.Column("organization_id", sa.Uuid(), sa.ForeignKey("organizations.id"), nullable=False)


organizations = sa.Table(
    "organizations",
    metadata,
    _id(),
    sa.Column("name", sa.Text(), nullable=False, unique=True),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("max_instances", sa.Integer()),
    sa.Column("max_memory_mb", sa.Integer()),
)

users = sa.Table(
    "users",
    metadata,
    _id(),
    _organization(),
    sa.Column("email", sa.Text(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.UniqueConstraint("organization_id", "email"),
)

tokens = sa.Table(
    "tokens",
    metadata,
    _id(),
    _organization(),
    sa.Column("user_id", sa.Uuid(), sa.ForeignKey("users.id")),
    sa.Column("name", sa.Text(), nullable=False),
    sa.Column("prefix", sa.Text(), nullable=False),
    sa.Column("digest", sa.LargeBinary(32), nullable=False, unique=True),
    sa.Column("scopes", sa.JSON(), nullable=False),
    sa.Column("dialect", sa.Text(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("last_used_at", UtcDateTime()),
    sa.Column("revoked_at", UtcDateTime()),
    # Counted within the organization: clients of `/v1/api-keys/` know integers.
    sa.Column("number", sa.Integer(), nullable=False),
    sa.Index(None, "organization_id", "number", unique=True),
)

profiles = sa.Table(
    "profiles",
    metadata,
    _id(),
    _organization(),
    sa.Column("name", sa.Text(), nullable=False),
    sa.Column("image", sa.Text(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("vcpu_count", sa.Integer(), nullable=False),
    sa.Column("memory_mb", sa.Integer(), nullable=False),
    sa.Column("disk_mb", sa.Integer(), nullable=False),
    # The names can be listed; the values are only in the sealed JSON object.
    sa.Column("env_names", sa.JSON(), nullable=False),
    sa.Column("env_sealed", sa.LargeBinary()),
    sa.Column("user", sa.Text()),
    sa.Column("workdir", sa.Text()),
    sa.Column("egress_policy", sa.JSON(), nullable=False),
    sa.Column("driver", sa.Text(), nullable=False),
    sa.Column("min_isolation", sa.Text(), nullable=False),
    sa.Column("warm_pool_size", sa.Integer(), nullable=False),
    sa.Column("idle_seconds", sa.Integer()),
    sa.Column("command_timeout_seconds", sa.Integer(), nullable=False),
    sa.Column("public_files", sa.Text(), nullable=False),
    sa.Column("revision", sa.Integer(), nullable=False),
    sa.UniqueConstraint("organization_id", "name"),
)

hosts = sa.Table(
    "hosts",
    metadata,
    _id(),
    sa.Column("name", sa.Text(), nullable=False),
    sa.Column("address", sa.Text(), nullable=False),
    sa.Column("draining", sa.Boolean(), nullable=False),
    sa.Column("drain_deadline", UtcDateTime()),
    sa.Column("last_seen_at", UtcDateTime(), nullable=False),
)

instances = sa.Table(
    "instances",
    metadata,
    _id(),
    _organization(),
    sa.Column("public_id", sa.Uuid(), nullable=False),
    # What it was made for: a room's profile, a VM's session, a build. Not a foreign key: rows of destroyed instances outlive their profile.
    sa.Column("profile_id", sa.Uuid(), nullable=False),
    sa.Column("image", sa.Text(), nullable=False),
    sa.Column("image_digest", sa.Text(), nullable=False),
    # The image's defaults of then, as one object; NULL in rows that are older than the column.
    sa.Column("image_config", sa.JSON(none_as_null=True)),
    sa.Column("vcpu_count", sa.Integer(), nullable=False),
    sa.Column("memory_mb", sa.Integer(), nullable=False),
    sa.Column("disk_mb", sa.Integer(), nullable=False),
    sa.Column("host_id", sa.Uuid()),
    sa.Column("desired", sa.Text(), nullable=False),
    sa.Column("state", sa.Text(), nullable=False),
    sa.Column("failure", sa.Text()),
    sa.Column("boot_trace", sa.JSON(), nullable=False),
    sa.Column("isolation", sa.JSON()),
    sa.Column("labels", sa.JSON(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("last_active_at", UtcDateTime()),
    sa.Column("revision", sa.Integer(), nullable=False),
    sa.Column("lock_token", sa.Uuid()),
    sa.Column("lock_expires_at", UtcDateTime()),
    sa.Column("destroyed_at", UtcDateTime()),
    sa.Index(None, "public_id", unique=True),
    sa.Index(None, "state"),
    sa.Index(None, "organization_id", "state"),
    sa.Index(None, "destroyed_at"),
)

rooms = sa.Table(
    "rooms",
    metadata,
    sa.Column("profile_id", sa.Uuid(), sa.ForeignKey("profiles.id"), primary_key=True),
    sa.Column("room_id", sa.Text(), primary_key=True),
    sa.Column("instance_id", sa.Uuid(), sa.ForeignKey("instances.id"), nullable=False, unique=True),
    sa.Column("created_at", UtcDateTime(), nullable=False),
)

sessions = sa.Table(
    "sessions",
    metadata,
    _id(),
    _organization(),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    # What its VMs are to be, without the environment, which is sealed.
    sa.Column("request", sa.JSON(), nullable=False),
    sa.Column("env_sealed", sa.LargeBinary()),
    sa.Index(None, "organization_id", "id"),
    sa.Index(None, "created_at"),
)

vms = sa.Table(
    "vms",
    metadata,
    sa.Column("instance_id", sa.Uuid(), sa.ForeignKey("instances.id"), primary_key=True),
    _organization(),
    sa.Column("session_id", sa.Uuid(), sa.ForeignKey("sessions.id"), nullable=False),
    sa.Column("generation", sa.Integer(), nullable=False),
    sa.Column("lifetime_seconds", sa.Integer(), nullable=False),
    sa.Column("expires_at", UtcDateTime(), nullable=False),
    sa.Column("memory_mb", sa.Integer(), nullable=False),
    sa.Column("metadata", sa.JSON(), nullable=False),
    sa.Column("image_variant", sa.Text()),
    sa.Column("idle_seconds", sa.Integer()),
    sa.Column("env_sealed", sa.LargeBinary()),
    # NULL in rows that are older than the column: the whole internet.
    sa.Column("egress_policy", sa.JSON(none_as_null=True)),
    # NULL in rows that are older than the columns: they asked for nothing.
    sa.Column("driver", sa.Text()),
    sa.Column("min_isolation", sa.Text()),
    sa.Column("hold_until", UtcDateTime()),
    sa.Column("hold_reason", sa.Text()),
    sa.Column("end_reason", sa.Text()),
    # The snapshot that it begins with, which may be gone since; how it did, once it came up: `memory` or `disk`.
    sa.Column("snapshot_id", sa.Uuid()),
    sa.Column("restored", sa.Text()),
    sa.Column("snapshot_on_terminate", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("snapshot_name", sa.Text()),
    # NULL in rows that are older than the columns: it is ended where it would end, and its use wakes it.
    sa.Column("auto_suspend", sa.Boolean()),
    sa.Column("auto_resume", sa.Boolean()),
    sa.Column("suspend_reason", sa.Text()),
    sa.Column("woken_by", sa.Text()),
    sa.Index(None, "organization_id", "instance_id"),
    sa.Index(None, "session_id"),
    sa.Index(None, "snapshot_id"),
)

vm_events = sa.Table(
    "vm_events",
    metadata,
    _id(),
    sa.Column("instance_id", sa.Uuid(), sa.ForeignKey("vms.instance_id"), nullable=False),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Column("type", sa.Text(), nullable=False),
    sa.Column("reason", sa.Text(), nullable=False),
    sa.Column("details", sa.JSON(), nullable=False),
    sa.Index(None, "instance_id", "id"),
)

# The instance may be gone, its host too; a parent as well.
snapshots = sa.Table(
    "snapshots",
    metadata,
    _id(),
    _organization(),
    # NULL, as the driver: it is an image.
    sa.Column("instance_id", sa.Uuid()),
    sa.Column("host_id", sa.Uuid(), nullable=False),
    sa.Column("name", sa.Text(), nullable=False),
    sa.Column("status", sa.Text(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("memory", sa.Boolean(), nullable=False),
    sa.Column("driver", sa.Text()),
    sa.Column("image", sa.Text(), nullable=False),
    sa.Column("image_digest", sa.Text(), nullable=False),
    sa.Column("image_config", sa.JSON(none_as_null=True)),
    sa.Column("vcpu_count", sa.Integer(), nullable=False),
    sa.Column("memory_mb", sa.Integer(), nullable=False),
    sa.Column("disk_mb", sa.Integer(), nullable=False),
    sa.Column("egress_policy", sa.JSON(), nullable=False),
    sa.Column("parent_id", sa.Uuid()),
    # Of a fork, which it goes with.
    sa.Column("passing", sa.Boolean(), nullable=False, server_default=sa.false()),
    # Ids of the volumes that were mounted, which are no part of it.
    sa.Column("volumes", sa.JSON(), nullable=False, server_default="[]"),
    sa.Column("oci_image", sa.Text()),
    sa.Column("env_sealed", sa.LargeBinary()),
    sa.Column("disk_bytes", sa.BigInteger()),
    sa.Column("memory_bytes", sa.BigInteger()),
    sa.Column("downtime_ms", sa.Float()),
    sa.Column("error", sa.Text()),
    sa.Column("mark", sa.JSON(none_as_null=True)),
    sa.Column("disk_digest", sa.Text()),
    sa.Column("verified_at", UtcDateTime()),
    sa.Column("checks", sa.JSON(none_as_null=True)),
    sa.Column("lock_token", sa.Uuid()),
    sa.Column("lock_expires_at", UtcDateTime()),
    sa.Index(None, "organization_id", "id"),
    sa.Index(None, "host_id"),
)

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    _id(),
    _organization(),
    sa.Column("key", sa.Text(), nullable=False),
    sa.Column("request_digest", sa.LargeBinary(32), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    # NULL while the request is under way, or when it was cut short.
    sa.Column("status", sa.Integer()),
    sa.Column("answer_sealed", sa.LargeBinary()),
    sa.UniqueConstraint("organization_id", "key"),
    sa.Index(None, "created_at"),
)

# No foreign keys: a row is of use only while its VM lives, and goes with its age alone.
executions = sa.Table(
    "executions",
    metadata,
    _id(),
    sa.Column("organization_id", sa.Uuid(), nullable=False),
    sa.Column("instance_id", sa.Uuid(), nullable=False),
    sa.Column("kind", sa.Text(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Index(None, "instance_id", "id"),
    sa.Index(None, "created_at"),
)

images = sa.Table(
    "images",
    metadata,
    _id(),
    # NULL: shipped with the server, and every organization's.
    sa.Column("organization_id", sa.Uuid(), sa.ForeignKey("organizations.id")),
    sa.Column("name", sa.Text(), nullable=False),
    sa.Column("digest", sa.Text(), nullable=False),
    sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    sa.Column("source", sa.Text(), nullable=False),
    sa.Column("source_ref", sa.Text()),
    sa.Column("status", sa.Text(), nullable=False),
    sa.Column("last_error", sa.Text()),
    sa.Column("config", sa.JSON(), nullable=False),
    sa.Column("tools", sa.JSON(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("updated_at", UtcDateTime(), nullable=False),
    sa.UniqueConstraint("organization_id", "name"),
    # To a constraint every NULL is another one.
    sa.Index(
        "ix_images_shipped_name",
        "name",
        unique=True,
        sqlite_where=sa.text("organization_id IS NULL"),
        postgresql_where=sa.text("organization_id IS NULL"),
    ),
)

image_builds = sa.Table(
    "image_builds",
    metadata,
    _id(),
    _organization(),
    sa.Column("name", sa.Text(), nullable=False),
    sa.Column("status", sa.Text(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("ended_at", UtcDateTime()),
    sa.Column("error", sa.Text()),
    sa.Column("digest", sa.Text()),
    sa.Index(None, "organization_id", "id"),
    sa.Index(None, "status"),
)

registry_credentials = sa.Table(
    "registry_credentials",
    metadata,
    _id(),
    _organization(),
    sa.Column("registry", sa.Text(), nullable=False),
    sa.Column("username", sa.Text(), nullable=False),
    sa.Column("password_sealed", sa.LargeBinary(), nullable=False),
    sa.Column("updated_at", UtcDateTime(), nullable=False),
    sa.UniqueConstraint("organization_id", "registry"),
)

ssh_keys = sa.Table(
    "ssh_keys",
    metadata,
    sa.Column("organization_id", sa.Uuid(), sa.ForeignKey("organizations.id"), primary_key=True),
    # Counted within the organization: clients of this table know integers.
    sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("public_key", sa.Text(), nullable=False),
    sa.Column("fingerprint", sa.Text(), nullable=False),
    sa.Column("comment", sa.Text(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    # A row stays, so that its number never means another key.
    sa.Column("removed_at", UtcDateTime()),
    # Whoever knocks is looked up before anything is known of them.
    sa.Index(None, "fingerprint"),
)

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("machine_id", sa.Text(), primary_key=True),
    # In UTC.
    sa.Column("day", sa.Date(), primary_key=True),
    sa.Column("organization_id", sa.Uuid(), sa.ForeignKey("organizations.id"), nullable=False),
    sa.Column("instance_id", sa.Uuid(), nullable=False),
    sa.Column("cpu_us", sa.BigInteger(), nullable=False),
    sa.Column("memory_mib_seconds", sa.Float(), nullable=False),
    # The day of an organization in one row; `machine_id` and `instance_id` are the organization's id then.
    sa.Column("merged", sa.Boolean(), nullable=False),
    sa.Index(None, "organization_id", "day"),
    sa.Index(None, "instance_id"),
    sa.Index(None, "day"),
)

shares = sa.Table(
    "shares",
    metadata,
    _id(),
    _organization(),
    sa.Column("instance_id", sa.Uuid(), sa.ForeignKey("instances.id", ondelete="CASCADE"), nullable=False),
    sa.Column("name", sa.Text(), nullable=False, unique=True),
    sa.Column("port", sa.Integer(), nullable=False),
    sa.Column("is_public", sa.Boolean(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Index(None, "instance_id"),
)

# Volumes, and with `checkpoint_of` checkpoints of them.
retention_policies = sa.Table(
    "retention_policies",
    metadata,
    sa.Column("organization_id", sa.Uuid(), sa.ForeignKey("organizations.id"), primary_key=True),
    # The fields of a RetentionRule each.
    sa.Column("snapshots", sa.JSON(), nullable=False),
    sa.Column("volume_checkpoints", sa.JSON(), nullable=False),
)

volumes = sa.Table(
    "volumes",
    metadata,
    _id(),
    _organization(),
    sa.Column("host_id", sa.Uuid(), nullable=False),
    sa.Column("checkpoint_of", sa.Uuid(), sa.ForeignKey("volumes.id")),
    sa.Column("name", sa.Text(), nullable=False),
    sa.Column("size_mb", sa.Integer(), nullable=False),
    sa.Column("status", sa.Text(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("error", sa.Text()),
    sa.Column("lock_token", sa.Uuid()),
    sa.Column("lock_expires_at", UtcDateTime()),
    sa.Index(None, "organization_id", "id"),
    sa.Index(None, "host_id"),
    sa.Index(None, "checkpoint_of", "id"),
)

volume_mounts = sa.Table(
    "volume_mounts",
    metadata,
    _id(),
    sa.Column("instance_id", sa.Uuid(), sa.ForeignKey("instances.id", ondelete="CASCADE"), nullable=False),
    sa.Column("volume_id", sa.Uuid(), sa.ForeignKey("volumes.id"), nullable=False),
    sa.Column("checkpoint_id", sa.Uuid(), sa.ForeignKey("volumes.id")),
    # The volume's id, or the checkpoint's: what the host knows.
    sa.Column("disk_id", sa.Uuid(), nullable=False),
    sa.Column("path", sa.Text(), nullable=False),
    sa.Column("read_only", sa.Boolean(), nullable=False),
    sa.Column("state", sa.Text(), nullable=False),
    sa.Index(None, "instance_id", "disk_id", unique=True),
    sa.Index(None, "volume_id"),
    sa.Index(None, "disk_id"),
)

audit_events = sa.Table(
    "audit_events",
    metadata,
    _id(),
    _organization(),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Column("actor", sa.Text(), nullable=False),
    sa.Column("action", sa.Text(), nullable=False),
    sa.Column("object_type", sa.Text(), nullable=False),
    sa.Column("object_id", sa.Text(), nullable=False),
    sa.Column("details", sa.JSON(), nullable=False),
    sa.Index(None, "organization_id", "id"),
)

server = sa.Table(
    "server",
    metadata,
    sa.Column("key", sa.Text(), primary_key=True),
    sa.Column("value", sa.Text(), nullable=False),
)
