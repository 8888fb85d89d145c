"""ends of baselines, which webhooks are sent of

Revision: 0017, after 0016
"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"

_ONE = "ck_webhook_deliveries_one_event"
_UNIQUE = "uq_webhook_deliveries_baseline_id_endpoint_id"
_FOREIGN = "fk_webhook_deliveries_baseline_id_baselines"
_UNSENT = sa.text("finished_at IS NOT NULL AND NOT fanned_out")


def upgrade() -> None:
    op.add_column("baselines", sa.Column("fanned_out", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_index("ix_baselines_outbox", "baselines", ["finished_at"], postgresql_where=_UNSENT)
    op.add_column("webhook_deliveries", sa.Column("baseline_id", sa.String(), nullable=True))
    op.create_foreign_key(op.f(_FOREIGN), "webhook_deliveries", "baselines", ["baseline_id"], ["id"])
    op.create_unique_constraint(op.f(_UNIQUE), "webhook_deliveries", ["baseline_id", "endpoint_id"])
    op.drop_constraint(op.f(_ONE), "webhook_deliveries")
    op.create_check_constraint(
        op.f(_ONE), "webhook_deliveries", "num_nonnulls(event_id, file_event_id, baseline_id) = 1"
    )


def downgrade() -> None:
    op.execute(
        "DELETE FROM webhook_tries WHERE delivery_id IN "
        "(SELECT id FROM webhook_deliveries WHERE baseline_id IS NOT NULL)"
    )
    op.execute("DELETE FROM webhook_deliveries WHERE baseline_id IS NOT NULL")
    op.drop_constraint(op.f(_ONE), "webhook_deliveries")
    op.drop_constraint(op.f(_UNIQUE), "webhook_deliveries")
    op.drop_constraint(op.f(_FOREIGN), "webhook_deliveries")
    op.drop_column("webhook_deliveries", "baseline_id")
    op.create_check_constraint(op.f(_ONE), "webhook_deliveries", "num_nonnulls(event_id, file_event_id) = 1")
    op.drop_index("ix_baselines_outbox", "baselines")
    op.drop_column("baselines", "fanned_out")
