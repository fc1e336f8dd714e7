"""What a node costs while it does not run, and since when it does not.

Written out in full, apart from gpubroker/run/tables.py: a migration does not change when the code does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade():
    op.add_column(
        "attempts", sa.Column("held_usd_per_hour", sa.BigInteger, nullable=False, server_default="0")
    )
    op.add_column("attempts", sa.Column("stopped_at", sa.BigInteger))
