"""progress and base of a cleaning

Revision: 0013, after 0012
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.add_column("file_cleanings", sa.Column("base_id", sa.String(), nullable=True))
    # With a default: workers of the release before insert rows without it.
    op.add_column("file_cleanings", sa.Column("progress", sa.Float(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    op.drop_column("file_cleanings", "progress")
    op.drop_column("file_cleanings", "base_id")
