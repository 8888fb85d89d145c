"""columns of file reports

Revision: 0021, after 0020
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    # With a default: the release before inserts rows without it.
    op.add_column(
        "file_reports", sa.Column("columns", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False)
    )


def downgrade() -> None:
    op.drop_column("file_reports", "columns")
