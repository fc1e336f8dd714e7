"""Jobs, what was rented for them, and machines to stay away from.

Written out in full, apart from gpubroker/run/tables.py: a migration does not change when the code does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _needed(name, kind=sa.Text):
    return sa.Column(name, kind, nullable=False)


def _text(name):
    return sa.Column(name, sa.Text, nullable=False, server_default="")


def upgrade():
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text, primary_key=True),
        _needed("spec"),
        _needed("state"),
        _text("reason"),
        _needed("created_at", sa.BigInteger),
        sa.Column("ended_at", sa.BigInteger),
    )
    op.create_table(
        "attempts",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.id"), nullable=False),
        _needed("epoch", sa.Integer),
        sa.Column("tag", sa.Text, nullable=False, unique=True),
        _needed("provider"),
        _needed("sku"),
        _needed("gpu"),
        _needed("form_factor"),
        _needed("vram_gib", sa.Integer),
        _needed("gpu_count", sa.Integer),
        _needed("market"),
        _needed("region"),
        _text("zone"),
        _text("machine_id"),
        _needed("usd_per_hour", sa.BigInteger),
        sa.Column("bid_usd_per_hour", sa.BigInteger),
        _needed("billing_increment_s", sa.Integer),
        _needed("minimum_s", sa.BigInteger),
        _needed("intended_at", sa.BigInteger),
        sa.Column("node_id", sa.Text),
        sa.Column("running_at", sa.BigInteger),
        sa.Column("ended_at", sa.BigInteger),
        _text("end_reason"),
        sa.Column("usd_estimated", sa.BigInteger),
        sa.Column("usd_settled", sa.BigInteger),
        sa.UniqueConstraint("job_id", "epoch"),
    )
    op.create_index("ix_attempts_open", "attempts", ["ended_at"])
    op.create_table(
        "avoided",
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("machine_id", sa.Text, primary_key=True),
        _needed("code"),
        _needed("reason"),
        _needed("until_at", sa.BigInteger),
    )
