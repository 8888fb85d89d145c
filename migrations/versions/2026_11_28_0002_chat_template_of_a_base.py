"""chat template of a base

Revision: 0002, after 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("models", sa.Column("chat_template", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("models", "chat_template")
