"""baselines

Revision: 0014, after 0013
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0014"
down_revision = "0013"

_WAITING = sa.text("status IN ('queued', 'running')")


def upgrade() -> None:
    op.create_table(
        "baselines",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("eval_file", sa.String(), nullable=False),
        sa.Column("examples_file", sa.String(), nullable=True),
        sa.Column("order", postgresql.JSONB(), nullable=False),
        sa.Column("external_key", sa.String(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("progress", sa.Float(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("result", postgresql.JSONB(), nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_baselines_status")
        ),
        sa.CheckConstraint(
            "(status IN ('queued', 'running')) = (finished_at IS NULL)", name=op.f("ck_baselines_ended_is_finished")
        ),
        sa.CheckConstraint("finished_at IS NULL OR external_key IS NULL", name=op.f("ck_baselines_ended_has_no_key")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_baselines_project_id_projects")),
        sa.ForeignKeyConstraint(["model"], ["models.id"], name=op.f("fk_baselines_model_models")),
        *(
            sa.ForeignKeyConstraint([name], ["files.id"], name=op.f(f"fk_baselines_{name}_files"))
            for name in ("eval_file", "examples_file")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_baselines")),
    )
    op.create_index("ix_baselines_project_created", "baselines", ["project_id", "created_at", "id"])
    op.create_index("ix_baselines_waiting", "baselines", ["created_at"], postgresql_where=_WAITING)


def downgrade() -> None:
    op.drop_table("baselines")
