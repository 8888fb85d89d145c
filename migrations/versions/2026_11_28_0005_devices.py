"""slots become devices

Revision: 0005, after 0004
"""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.rename_table("slots", "devices")
    op.execute("ALTER INDEX pk_slots RENAME TO pk_devices")
    op.execute("ALTER INDEX ix_slots_host RENAME TO ix_devices_host")
    # The release before this one reads and writes `slots` while it is replaced. A view of one whole table takes its
    # writes too, ON CONFLICT among them. A later release drops it.
    op.execute("CREATE VIEW slots AS SELECT * FROM devices")


def downgrade() -> None:
    op.execute("DROP VIEW slots")
    op.execute("ALTER INDEX ix_devices_host RENAME TO ix_slots_host")
    op.execute("ALTER INDEX pk_devices RENAME TO pk_slots")
    op.rename_table("devices", "slots")
