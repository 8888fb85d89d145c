"""reruns of jobs, and what a job read

Revision: 0009, after 0008
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("rerun_of", sa.String(), nullable=True))
    op.add_column("jobs", sa.Column("template_time", sa.DateTime(timezone=True), nullable=True))
    # Null for the jobs that are there: what they read is compared by what is there today.
    op.add_column("jobs", sa.Column("inputs", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "inputs")
    op.drop_column("jobs", "template_time")
    op.drop_column("jobs", "rerun_of")
