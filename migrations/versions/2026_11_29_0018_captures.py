"""captured requests

Revision: 0018, after 0017
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018"
down_revision = "0017"


def _created_at() -> sa.Column[Any]:
    now = sa.text("clock_timestamp()")
    return sa.Column("created_at", sa.DateTime(timezone=True), server_default=now, nullable=False)


def upgrade() -> None:
    op.create_table(
        "captures",
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("keep_days", sa.Integer(), nullable=False),
        _created_at(),
        sa.CheckConstraint("keep_days BETWEEN 1 AND 365", name=op.f("ck_captures_keep_days")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_captures_project_id_projects")),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_captures_model_id_models")),
        sa.PrimaryKeyConstraint("project_id", "model_id", name=op.f("pk_captures")),
    )
    op.create_table(
        "captured_requests",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("request", postgresql.JSONB(), nullable=False),
        sa.Column("answer", postgresql.JSONB(), nullable=False),
        sa.Column("finish_reason", sa.String(), nullable=False),
        sa.Column("rating", sa.Integer(), nullable=True),
        sa.Column("correction", postgresql.JSONB(), nullable=True),
        _created_at(),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("rating IN (-1, 1)", name=op.f("ck_captured_requests_rating")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_captured_requests_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_captured_requests")),
    )
    names = ["project_id", "model_id", "created_at", "id"]
    op.create_index("ix_captured_requests_of_model", "captured_requests", names)
    op.create_index("ix_captured_requests_expiry", "captured_requests", ["expires_at"])
    op.create_table(
        "captured_files",
        sa.Column("file_id", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("order", postgresql.JSONB(), nullable=False),
        sa.Column("outcome", postgresql.JSONB(), nullable=False),
        _created_at(),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name=op.f("fk_captured_files_file_id_files")),
        sa.PrimaryKeyConstraint("file_id", name=op.f("pk_captured_files")),
    )


def downgrade() -> None:
    for table in ("captured_files", "captured_requests", "captures"):
        op.drop_table(table)
