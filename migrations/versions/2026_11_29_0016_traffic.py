"""rates and usage of models

Revision: 0016, after 0015
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"

RATES = ("requests_per_minute", "tokens_per_minute")


def upgrade() -> None:
    for name in RATES:
        op.add_column("projects", sa.Column(name, sa.Integer(), nullable=True))
        op.create_check_constraint(op.f(f"ck_projects_{name}"), "projects", f"{name} >= 0")
    op.create_table(
        "request_rates",
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("requests_left", sa.Float(), nullable=False),
        sa.Column("tokens_left", sa.Float(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_request_rates_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", name=op.f("pk_request_rates")),
    )
    op.create_table(
        "model_usage",
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in ("requests", "prompt_tokens", "completion_tokens")
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_model_usage_project_id_projects")),
        sa.PrimaryKeyConstraint("project_id", "day", "model_id", name=op.f("pk_model_usage")),
    )


def downgrade() -> None:
    op.drop_table("model_usage")
    op.drop_table("request_rates")
    for name in RATES:
        op.drop_column("projects", name)
