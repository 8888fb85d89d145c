"""what a job is quoted, and what it took

Revision: 0015, after 0014
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    for name in ("quote", "actual"):
        op.add_column("jobs", sa.Column(name, postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    for name in ("actual", "quote"):
        op.drop_column("jobs", name)
