"""What the user's own runs did: steps of a finished run (measurements), and preemptions of nodes (exposure).

Written out in full, apart from gpubroker/prices/tables.py: a migration does not change when the code does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _needed(name, kind=sa.Text):
    return sa.Column(name, kind, nullable=False)


def upgrade():
    op.create_table(
        "measurements",
        sa.Column("id", _ID, primary_key=True),
        _needed("job"),
        _needed("gpu"),
        _needed("form_factor"),
        _needed("gpu_count", sa.Integer),
        _needed("steps", sa.BigInteger),
        _needed("duration_ms", sa.BigInteger),
        _needed("measured_at", sa.BigInteger),
    )
    op.create_index("ix_measurements_job", "measurements", ["job"])
    op.create_table(
        "exposure",
        sa.Column("id", _ID, primary_key=True),
        _needed("provider"),
        _needed("gpu"),
        _needed("region"),
        _needed("market"),
        _needed("preemptions", sa.Integer),
        _needed("exposed_s", sa.BigInteger),
        _needed("since_at", sa.BigInteger),
        _needed("until_at", sa.BigInteger),
    )
    op.create_index("ix_exposure_until_at", "exposure", ["until_at"])
