"""retention

Revision: 0004, after 0003
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # A default of the server's own: the release before this one still writes jobs while it is replaced.
    records: sa.Column[list[str]] = sa.Column(
        "removed_records", postgresql.ARRAY(sa.Text()), nullable=False, server_default="{}"
    )
    op.add_column("jobs", records)
    op.add_column("models", sa.Column("purged_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("models", "purged_at")
    op.drop_column("jobs", "removed_records")
