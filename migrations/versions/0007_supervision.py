"""Supervisors and the jobs that each of them has, what a job is to come to, events and their readers.

Written out in full, apart from gpubroker/run/tables.py: a migration does not change when the code does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _needed(name, kind=sa.Text):
    return sa.Column(name, kind, nullable=False)


def _text(name):
    return sa.Column(name, sa.Text, nullable=False, server_default="")


def _count(name):
    return sa.Column(name, sa.Integer, nullable=False, server_default="0")


def upgrade():
    op.create_table(
        "supervisors",
        sa.Column("id", sa.Text, primary_key=True),
        _needed("host"),
        _needed("pid", sa.Integer),
        _needed("version"),
        _needed("started_at", sa.BigInteger),
        _needed("until_at", sa.BigInteger),
    )
    op.add_column("jobs", sa.Column("unattended", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("supervisor_id", sa.Text))
    op.add_column("jobs", _count("claims"))
    op.add_column("jobs", _text("wanted"))
    op.add_column("jobs", _text("wanted_why"))
    op.add_column("jobs", sa.Column("wanted_at", sa.BigInteger))
    op.add_column("jobs", _count("told_percent"))
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.add_column("attempts", _text("end_kind"))
    op.create_table(
        "events",
        sa.Column("id", _ID, primary_key=True),
        _needed("at", sa.BigInteger),
        sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.id")),
        sa.Column("attempt_id", sa.BigInteger),
        _needed("kind"),
        _needed("text"),
    )
    op.create_index("ix_events_job", "events", ["job_id", "id"])
    op.create_table(
        "cursors",
        sa.Column("name", sa.Text, primary_key=True),
        _needed("position", sa.BigInteger),
        _needed("moved_at", sa.BigInteger),
    )
