"""reports of files, and the events that webhooks send of them

Revision: 0011, after 0010
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "file_reports",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("base", sa.String(), nullable=False),
        sa.Column("against", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("progress", sa.Float(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("summary", postgresql.JSONB(), nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("status IN ('queued', 'running', 'ready', 'failed')", name=op.f("ck_file_reports_status")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_file_reports_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_file_reports")),
        sa.UniqueConstraint(
            "project_id", "sha256", "base", "against", name=op.f("uq_file_reports_project_id_sha256_base_against")
        ),
    )
    op.create_index(
        "ix_file_reports_waiting",
        "file_reports",
        ["created_at"],
        postgresql_where=sa.text("status IN ('queued', 'running')"),
    )
    op.create_table(
        "file_events",
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("file_id", sa.String(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("data", postgresql.JSONB(), nullable=True),
        sa.Column("fanned_out", sa.Boolean(), nullable=False),
        sa.CheckConstraint("outcome IN ('processed', 'failed')", name=op.f("ck_file_events_outcome")),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name=op.f("fk_file_events_file_id_files")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_file_events")),
        sa.UniqueConstraint("id", name=op.f("uq_file_events_id")),
        sa.UniqueConstraint("file_id", name=op.f("uq_file_events_file_id")),
    )
    op.create_index("ix_file_events_outbox", "file_events", ["seq"], postgresql_where=sa.text("NOT fanned_out"))
    op.add_column("webhook_deliveries", sa.Column("file_event_id", sa.String(), nullable=True))
    op.alter_column("webhook_deliveries", "event_id", existing_type=sa.String(), nullable=True)
    op.create_foreign_key(
        op.f("fk_webhook_deliveries_file_event_id_file_events"),
        "webhook_deliveries",
        "file_events",
        ["file_event_id"],
        ["id"],
    )
    op.create_unique_constraint(
        op.f("uq_webhook_deliveries_file_event_id_endpoint_id"), "webhook_deliveries", ["file_event_id", "endpoint_id"]
    )
    op.create_check_constraint(
        op.f("ck_webhook_deliveries_one_event"), "webhook_deliveries", "num_nonnulls(event_id, file_event_id) = 1"
    )


def downgrade() -> None:
    op.execute(
        "DELETE FROM webhook_tries WHERE delivery_id IN (SELECT id FROM webhook_deliveries WHERE event_id IS NULL)"
    )
    op.execute("DELETE FROM webhook_deliveries WHERE event_id IS NULL")
    op.drop_constraint(op.f("ck_webhook_deliveries_one_event"), "webhook_deliveries")
    op.drop_constraint(op.f("uq_webhook_deliveries_file_event_id_endpoint_id"), "webhook_deliveries")
    op.drop_constraint(op.f("fk_webhook_deliveries_file_event_id_file_events"), "webhook_deliveries")
    op.drop_column("webhook_deliveries", "file_event_id")
    op.alter_column("webhook_deliveries", "event_id", existing_type=sa.String(), nullable=False)
    op.drop_table("file_events")
    op.drop_table("file_reports")
