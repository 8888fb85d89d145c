"""when the worker of a device was stopped

Revision: 0023, after 0022
"""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"


def upgrade() -> None:
    op.add_column("devices", sa.Column("stopped_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("devices", "stopped_at")
