"""cleanings of files

Revision: 0012, after 0011
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.create_table(
        "file_cleanings",
        sa.Column("file_id", sa.String(), nullable=False),
        sa.Column("source_id", sa.String(), nullable=False),
        sa.Column("against_id", sa.String(), nullable=True),
        sa.Column("held_out_id", sa.String(), nullable=True),
        sa.Column("order", postgresql.JSONB(), nullable=False),
        sa.Column("outcome", postgresql.JSONB(), nullable=True),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        *(
            sa.ForeignKeyConstraint([name], ["files.id"], name=op.f(f"fk_file_cleanings_{name}_files"))
            for name in ("file_id", "source_id", "against_id", "held_out_id")
        ),
        sa.PrimaryKeyConstraint("file_id", name=op.f("pk_file_cleanings")),
        sa.UniqueConstraint("held_out_id", name=op.f("uq_file_cleanings_held_out_id")),
    )


def downgrade() -> None:
    op.drop_table("file_cleanings")
