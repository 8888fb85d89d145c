"""gate

Revision: 0007, after 0006
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("gate", postgresql.JSONB(), nullable=True))
    # A default of the server's own: the release before this one still writes models while it is replaced.
    op.add_column("models", sa.Column("withheld", sa.Boolean(), nullable=False, server_default="false"))


def downgrade() -> None:
    op.drop_column("models", "withheld")
    op.drop_column("jobs", "gate")
