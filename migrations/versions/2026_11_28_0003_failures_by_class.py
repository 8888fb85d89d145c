"""failures by class

Revision: 0003, after 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # Defaults of the server's own: the release before this one still writes jobs while it is replaced.
    op.add_column("jobs", sa.Column("losses", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("validations", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("snapshot_step", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "snapshot_step")
    op.drop_column("jobs", "validations")
    op.drop_column("jobs", "losses")
