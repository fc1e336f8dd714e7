"""Limits that a person wants to hear of when a price comes below them.

Written out in full, apart from gpubroker/run/tables.py: a migration does not change when the code does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade():
    op.create_table(
        "alerts",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("wanted", sa.Text, nullable=False),
        sa.Column("usd_per_gpu_hour", sa.BigInteger, nullable=False),
        sa.Column("is_below", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("told", sa.Integer, nullable=False, server_default="0"),
        sa.Column("told_at", sa.BigInteger),
        sqlite_autoincrement=True,
    )
