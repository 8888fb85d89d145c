"""one report of a content and of columns

Revision: 0022, after 0021
"""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"

_CONTENT = ["project_id", "sha256", "base", "against"]
_OLD = "uq_file_reports_project_id_sha256_base_against"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # An attempt that was given up leaves an index that is not valid.
        op.drop_index("uq_file_reports_content", "file_reports", if_exists=True, postgresql_concurrently=True)
        op.create_index(
            "uq_file_reports_content",
            "file_reports",
            [*_CONTENT, sa.text("md5(columns::text)")],
            unique=True,
            postgresql_concurrently=True,
        )
    op.drop_constraint(op.f(_OLD), "file_reports")


def downgrade() -> None:
    op.execute("DELETE FROM file_reports WHERE columns <> '{}'")
    op.create_unique_constraint(op.f(_OLD), "file_reports", _CONTENT)
    op.drop_index("uq_file_reports_content", "file_reports")
