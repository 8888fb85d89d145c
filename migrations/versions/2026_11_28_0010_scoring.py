"""scoring

Revision: 0010, after 0009
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("models", sa.Column("scoring", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("models", "scoring")
