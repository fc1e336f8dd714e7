"""What was thinned, and polls found by the offers that they last confirmed, so that one goes in no time.

Written out in full, apart from gpubroker/prices/tables.py: a migration does not change when the code does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade():
    op.create_table(
        "compactions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("until_at", sa.BigInteger, nullable=False),
        sa.Column("begun_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("spans", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("offers", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("polls", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_index("ix_latest_confirmed", "latest", ["confirmed_by"])
