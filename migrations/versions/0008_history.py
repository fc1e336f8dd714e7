"""Days of prices, and spans found by when they ended.

Written out in full, apart from gpubroker/prices/tables.py: a migration does not change when the code does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade():
    op.create_table(
        "daily",
        sa.Column("product_id", sa.BigInteger, sa.ForeignKey("products.id"), primary_key=True),
        sa.Column("day", sa.Integer, primary_key=True),
        sa.Column("usd_per_hour", sa.BigInteger, primary_key=True),
        sa.Column("n", sa.Integer, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "rolled",
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("until_day", sa.Integer, nullable=False),
    )
    op.create_index("ix_spans_until", "spans", ["until_at"])
