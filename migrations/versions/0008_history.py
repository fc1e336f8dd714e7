"""Days of prices, spans found by when they ended, and how far exports have come.

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
    op.create_table(
        "exports",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("done", sa.Text, nullable=False),
        sa.Column("pending", sa.Text),
    )
    op.create_index("ix_spans_until", "spans", ["until_at"])
