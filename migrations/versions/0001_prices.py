"""Polls, offers and their price spans; provider states and limits; imported history.

Written out in full, apart from gpubroker/prices/tables.py: a migration does not change when the code does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _text(name, default=None):
    return sa.Column(name, sa.Text, nullable=False, server_default=default)


def _count(name):
    return sa.Column(name, sa.Integer, nullable=False, server_default="0")


def _reference(table, column=None, **options):
    return sa.Column(
        column or f"{table[:-1]}_id", _ID, sa.ForeignKey(f"{table}.id"), **{"nullable": False, **options}
    )


def upgrade():
    _create_polls()
    _create_offers()
    _create_spans()
    _create_state()
    _create_history()


def _create_polls():
    op.create_table(
        "polls",
        sa.Column("id", _ID, primary_key=True),
        _text("provider"),
        _text("scope"),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("observed_at", sa.BigInteger),
        _count("fetched"),
        _count("kept"),
        _count("skipped"),
        _text("skips", "{}"),
        _text("incomplete", "[]"),
        _text("unknown_offers", "[]"),
        sa.Column("error", sa.Text),
        _text("source", ""),
        _text("notes", "[]"),
        sa.UniqueConstraint("provider", "observed_at"),
    )
    op.create_table(
        "coverage",
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("scope", sa.Text, primary_key=True),
        _reference("polls"),
    )


def _create_offers():
    identity = ("sku", "gpu", "form_factor", "gpu_count", "vram_gib", "market", "preemptible")
    place = ("region", "zone", "cloud")
    op.create_table(
        "products",
        sa.Column("id", _ID, primary_key=True),
        _text("provider"),
        _text("sku"),
        _text("gpu"),
        _text("form_factor"),
        sa.Column("gpu_count", sa.Integer, nullable=False),
        sa.Column("vram_gib", sa.Integer, nullable=False),
        _text("market"),
        sa.Column("preemptible", sa.Boolean, nullable=False),
        _text("region"),
        _text("zone"),
        _text("cloud"),
        sa.UniqueConstraint("provider", *identity, *place),
    )
    op.create_index("ix_products_gpu", "products", ["gpu"])
    op.create_table(
        "offers",
        sa.Column("id", _ID, primary_key=True),
        _reference("products"),
        _text("machine_id"),
        _text("host_id"),
        sa.UniqueConstraint("product_id", "machine_id"),
    )


def _create_spans():
    op.create_table(
        "rates",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("digest", sa.Text, nullable=False, unique=True),
        sa.Column("billing_increment_s", sa.Integer, nullable=False),
        sa.Column("minimum_s", sa.BigInteger, nullable=False),
        sa.Column("disk_included_gb", sa.BigInteger, nullable=False),
        sa.Column("storage_usd_per_gb_month", sa.BigInteger),
        sa.Column("egress_usd_per_gb", sa.BigInteger),
        sa.Column("ingress_usd_per_gb", sa.BigInteger),
        sa.Column("cpu_usd_per_core_hour", sa.BigInteger),
        sa.Column("ram_usd_per_gib_hour", sa.BigInteger),
        sa.Column("verified", sa.Boolean),
    )
    op.create_table(
        "spans",
        sa.Column("id", _ID, primary_key=True),
        _reference("offers"),
        _reference("rates", "rates_id"),
        sa.Column("usd_per_hour", sa.BigInteger, nullable=False),
        sa.Column("first_at", sa.BigInteger, nullable=False),
        sa.Column("until_at", sa.BigInteger),
    )
    is_open = sa.text("until_at IS NULL")
    op.create_index("ix_spans_offer", "spans", ["offer_id", "first_at"])
    op.create_index(
        "ix_spans_open", "spans", ["offer_id"], unique=True, sqlite_where=is_open, postgresql_where=is_open
    )
    op.create_table(
        "latest",
        _reference("offers", primary_key=True, autoincrement=False),
        _reference("products"),
        _text("machine_id"),
        _reference("rates", "rates_id"),
        sa.Column("usd_per_hour", sa.BigInteger, nullable=False),
        _reference("polls", "confirmed_by", nullable=True),
    )
    op.create_index("ix_latest_product_id", "latest", ["product_id"])
    op.create_table(
        "listings",
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("gpu", sa.Text, primary_key=True),
        _text("offers"),
    )


def _create_state():
    op.create_table(
        "provider_state",
        sa.Column("provider", sa.Text, primary_key=True),
        _text("missing", ""),
        sa.Column("unreachable_until", sa.BigInteger),
        _text("reason", ""),
        sa.Column("tried_at", sa.BigInteger),
        sa.Column("asked_with", sa.Text, nullable=False, server_default=""),
    )
    op.create_table(
        "limits",
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("endpoint", sa.Text, primary_key=True),
        sa.Column("next_at_ms", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("blocked_until", sa.BigInteger, nullable=False, server_default="0"),
        _text("reason", ""),
    )


def _create_history():
    names = ("provider", "sku", "gpu", "form_factor", "gpu_count", "market", "region", "stat", "source")
    op.create_table(
        "series",
        sa.Column("id", _ID, primary_key=True),
        *(_text(n) if n != "gpu_count" else sa.Column(n, sa.Integer, nullable=False) for n in names),
        sa.UniqueConstraint(*names),
    )
    op.create_table(
        "observations",
        _reference("series", "series_id"),
        sa.Column("observed_at", sa.BigInteger, nullable=False),
        sa.Column("usd_per_hour", sa.BigInteger),
        sa.Column("available", sa.Integer),
        sa.Column("n_offers", sa.Integer),
    )
    same = [sa.text(f"coalesce({column}, -1)") for column in ("usd_per_hour", "available", "n_offers")]
    op.create_index("uq_observations", "observations", ["series_id", "observed_at", *same], unique=True)
