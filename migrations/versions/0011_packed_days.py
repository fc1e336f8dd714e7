"""A row for each product's day, with all its prices, instead of a row for each price; whose span ended when.

Written out in full, apart from gpubroker/prices/tables.py: a migration does not change when the code does.
"""

from array import array
from itertools import groupby, islice

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade():
    connection = op.get_bind()
    op.rename_table("daily", "daily_before")
    if connection.dialect.name == "postgresql":
        op.execute("ALTER INDEX daily_pkey RENAME TO daily_before_pkey")
    op.create_table(
        "daily",
        sa.Column("product_id", sa.BigInteger, sa.ForeignKey("products.id"), primary_key=True),
        sa.Column("day", sa.Integer, primary_key=True),
        sa.Column("prices", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
    days = sa.table("daily", sa.column("product_id"), sa.column("day"), sa.column("prices"))
    sql = "SELECT product_id, day, usd_per_hour, n FROM daily_before ORDER BY product_id, day, usd_per_hour"
    found = connection.execute(sa.text(sql).execution_options(stream_results=True))
    packed = (
        {"product_id": product_id, "day": day, "prices": _packed([row[2:] for row in rows])}
        for (product_id, day), rows in groupby(found, lambda row: tuple(row[:2]))
    )
    while some := list(islice(packed, 10_000)):
        connection.execute(days.insert(), some)
    op.drop_table("daily_before")
    op.drop_index("ix_spans_until", "spans")
    op.create_index("ix_spans_until", "spans", ["until_at", "offer_id"])


def _packed(prices):
    usd, counts = zip(*prices, strict=True)
    return array("q", (*usd, *counts)).tobytes()
