"""alias of a job's base

Revision: 0006, after 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # Null for the jobs that are there: they and what they make keep the base's id in their names.
    op.add_column("jobs", sa.Column("base_alias", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "base_alias")
