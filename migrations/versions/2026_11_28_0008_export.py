"""export

Revision: 0008, after 0007
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("models", sa.Column("export", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("models", "export")
