"""index of the runs that quotes are made of

Revision: 0019, after 0018
"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # An attempt that was given up leaves an index that is not valid.
        op.drop_index("ix_jobs_measured", "jobs", if_exists=True, postgresql_concurrently=True)
        op.create_index(
            "ix_jobs_measured",
            "jobs",
            [sa.text("(actual ->> 'device')"), "finished_at"],
            postgresql_where=sa.text("state = 'succeeded' AND jsonb_typeof(actual -> 'kept') = 'object'"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.drop_index("ix_jobs_measured", "jobs", postgresql_concurrently=True)
