"""The tables of the price store, for SQLite and PostgreSQL, and the two column types that they need.

migrations/ creates them; a test holds both alike. What each span means: docs/decisions/0003-spans.md.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)

from gpubroker.money import from_micros, to_micros
from gpubroker.prices.rows import PRODUCT, moment, seconds


class Money(TypeDecorator[Decimal]):
    """Decimal USD as integer micro-dollars. A float raises TypeError, a finer amount ValueError."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> int | None:
        """To the database."""
        return None if value is None else to_micros(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        """From the database."""
        return None if value is None else from_micros(value)


class Moment(TypeDecorator[datetime]):
    """An aware UTC datetime as integer seconds since 1970. A naive one raises ValueError."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> int | None:
        """To the database."""
        return None if value is None else seconds(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """From the database."""
        return None if value is None else moment(value)


metadata = MetaData()
# SQLite counts up by itself only a column called INTEGER.
Id = BigInteger().with_variant(Integer, "sqlite")


def text_column(name: str, default: str = "") -> Column[str]:
    """Never NULL: what is not stated is "", so that it compares and joins."""
    return Column(name, Text, nullable=False, server_default=default)


polls = Table(
    "polls",
    metadata,
    Column("id", Id, primary_key=True),
    Column("provider", Text, nullable=False),
    Column("scope", Text, nullable=False),  # JSON of the OfferQuery
    Column("started_at", Moment, nullable=False),
    Column("finished_at", Moment),  # NULL = running, or its process died
    Column("observed_at", Moment),  # NULL = nothing was kept; strictly increasing per provider
    Column("fetched", Integer, nullable=False, server_default="0"),
    Column("kept", Integer, nullable=False, server_default="0"),
    Column("skipped", Integer, nullable=False, server_default="0"),
    text_column("skips", "{}"),  # JSON: reason -> [count, first five ids]
    text_column("incomplete", "[]"),  # JSON: the slices that were not seen whole
    text_column("unknown_offers", "[]"),  # JSON: ids of current offers in those slices that were not listed
    Column("error", Text),
    text_column("source"),
    text_column("notes", "[]"),  # JSON
    UniqueConstraint("provider", "observed_at"),
)

# The newest kept poll of each scope: how old a current price is, without walking through the polls.
coverage = Table(
    "coverage",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("scope", Text, primary_key=True),
    Column("poll_id", Id, ForeignKey("polls.id"), nullable=False),
)

products = Table(
    "products",
    metadata,
    Column("id", Id, primary_key=True),
    Column("provider", Text, nullable=False),
    Column("sku", Text, nullable=False),
    Column("gpu", Text, nullable=False, index=True),
    Column("form_factor", Text, nullable=False),
    Column("gpu_count", Integer, nullable=False),
    Column("vram_gib", Integer, nullable=False),
    Column("market", Text, nullable=False),
    Column("preemptible", Boolean, nullable=False),
    Column("region", Text, nullable=False),
    Column("zone", Text, nullable=False),
    Column("cloud", Text, nullable=False),
    UniqueConstraint(*PRODUCT),
)

offers = Table(
    "offers",
    metadata,
    Column("id", Id, primary_key=True),
    Column("product_id", Id, ForeignKey("products.id"), nullable=False),
    Column("machine_id", Text, nullable=False),
    Column("host_id", Text, nullable=False),  # as listed when it last came
    UniqueConstraint("product_id", "machine_id"),
)

# The priced terms but the price: few combinations, so each is kept once.
rates = Table(
    "rates",
    metadata,
    Column("id", Id, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),  # all of them as one text: NULLs are never equal
    Column("billing_increment_s", Integer, nullable=False),
    Column("minimum_s", BigInteger, nullable=False),
    Column("disk_included_gb", BigInteger, nullable=False),
    Column("storage_usd_per_gb_month", Money),
    Column("egress_usd_per_gb", Money),
    Column("ingress_usd_per_gb", Money),
    Column("cpu_usd_per_core_hour", Money),
    Column("ram_usd_per_gib_hour", Money),
    Column("verified", Boolean),
)

spans = Table(
    "spans",
    metadata,
    Column("id", Id, primary_key=True),
    Column("offer_id", Id, ForeignKey("offers.id"), nullable=False),
    Column("rates_id", Id, ForeignKey("rates.id"), nullable=False),
    Column("usd_per_hour", Money, nullable=False),
    Column("first_at", Moment, nullable=False),
    Column("until_at", Moment),  # exclusive; NULL = open
    Index("ix_spans_offer", "offer_id", "first_at"),
    Index("ix_spans_until", "until_at", "offer_id"),
    Index(
        "ix_spans_open",
        "offer_id",
        unique=True,
        sqlite_where=text("until_at IS NULL"),
        postgresql_where=text("until_at IS NULL"),
    ),
)

# Spans and polls of the days that are over, counted (daily.py): day = seconds since 1970 // 86400. `prices`
# is daily.packed: each price in micro-dollars with its observations (an offer at a poll is one).
daily = Table(
    "daily",
    metadata,
    Column("product_id", BigInteger, ForeignKey("products.id"), primary_key=True, autoincrement=False),
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("prices", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

# How often single machines left the spot list on a day that is over, and how long they were on it together.
stays = Table(
    "stays",
    metadata,
    Column("gpu", Text, primary_key=True),
    Column("provider", Text, primary_key=True),
    Column("market", Text, primary_key=True),
    Column("region", Text, primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("ends", Integer, nullable=False),
    Column("open_s", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

rolled = Table(
    "rolled",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("until_day", Integer, nullable=False),  # exclusive
)

# Named exports: up to when each provider's ended spans are in files, and what is being written.
exports = Table(
    "exports",
    metadata,
    Column("name", Text, primary_key=True),
    Column("number", Integer, nullable=False),  # of the last run whose files are whole
    Column("done", Text, nullable=False),  # JSON: provider -> second
    Column("pending", Text),  # JSON of exports.Pending; NULL = none is under way
)

# What was thinned (compacting.py): a provider's spans that had ended by until_at, and its polls before it.
compactions = Table(
    "compactions",
    metadata,
    Column("id", Id, primary_key=True),
    Column("provider", Text, nullable=False),
    Column("until_at", Moment, nullable=False),  # a midnight
    Column("begun_at", Moment, nullable=False),
    Column("ended_at", Moment),  # NULL = it is under way or was cut off: the next one goes on with it
    Column("spans", BigInteger, nullable=False, server_default="0"),  # rows that are gone
    Column("offers", BigInteger, nullable=False, server_default="0"),
    Column("polls", BigInteger, nullable=False, server_default="0"),
)

# What is current: a row for each open span, with what a poll compares and a quote reads, so that neither
# ever walks through the history.
latest = Table(
    "latest",
    metadata,
    Column("offer_id", Id, ForeignKey("offers.id"), primary_key=True, autoincrement=False),
    Column("product_id", Id, ForeignKey("products.id"), nullable=False, index=True),
    Column("machine_id", Text, nullable=False),  # these three: as in the offer and its open span
    Column("rates_id", Id, ForeignKey("rates.id"), nullable=False),
    Column("usd_per_hour", Money, nullable=False),
    # NULL = the newest poll that covers the offer saw it; else the last poll that did.
    Column("confirmed_by", Id, ForeignKey("polls.id")),
    Index("ix_latest_confirmed", "confirmed_by"),  # a poll that goes is looked for here
)

# What is volatile of the current offers. It changes for nearly all of them at every poll, and is read by GPU:
# one JSON text a (provider, GPU) costs a third of a row an offer. rows.listings_json says what is in it.
listings = Table(
    "listings",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("gpu", Text, primary_key=True),
    Column("offers", Text, nullable=False),
)

provider_state = Table(
    "provider_state",
    metadata,
    Column("provider", Text, primary_key=True),
    text_column("missing"),
    Column("unreachable_until", Moment),
    text_column("reason"),
    Column("tried_at", Moment),
    text_column("asked_with"),  # Settings.asks_with at the last attempt
)

limits = Table(
    "limits",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("endpoint", Text, primary_key=True),
    Column("next_at_ms", BigInteger, nullable=False, server_default="0"),
    Column("blocked_until", BigInteger, nullable=False, server_default="0"),  # seconds
    text_column("reason"),
)

# Imported history: other people's observations, kept apart from our own polls.
series = Table(
    "series",
    metadata,
    Column("id", Id, primary_key=True),
    Column("provider", Text, nullable=False),
    Column("sku", Text, nullable=False),
    Column("gpu", Text, nullable=False),
    Column("form_factor", Text, nullable=False),
    Column("gpu_count", Integer, nullable=False),
    Column("market", Text, nullable=False),  # ours, or "mixed"
    Column("region", Text, nullable=False),
    Column("stat", Text, nullable=False),
    Column("source", Text, nullable=False),
    UniqueConstraint(
        "provider", "sku", "gpu", "form_factor", "gpu_count", "market", "region", "stat", "source"
    ),
)

observations = Table(
    "observations",
    metadata,
    Column("series_id", Id, ForeignKey("series.id"), nullable=False),
    Column("observed_at", Moment, nullable=False),
    Column("usd_per_hour", Money),
    Column("available", Integer),  # 1 or 0
    Column("n_offers", Integer),
    # The same row twice is one; two prices at one moment both stay. NULLs count as equal.
    Index(
        "uq_observations",
        "series_id",
        "observed_at",
        text("coalesce(usd_per_hour, -1)"),
        text("coalesce(available, -1)"),
        text("coalesce(n_offers, -1)"),
        unique=True,
    ),
)

# What the user's own runs did; gpubroker/measurements.py and gpubroker/exposure.py write and read it.
measurements = Table(
    "measurements",
    metadata,
    Column("id", Id, primary_key=True),
    Column("job", Text, nullable=False, index=True),
    Column("gpu", Text, nullable=False),
    Column("form_factor", Text, nullable=False),
    Column("gpu_count", Integer, nullable=False),
    Column("steps", BigInteger, nullable=False),  # of the whole run
    Column("duration_ms", BigInteger, nullable=False),
    Column("measured_at", Moment, nullable=False),
)

exposure = Table(
    "exposure",
    metadata,
    Column("id", Id, primary_key=True),
    Column("provider", Text, nullable=False),
    Column("gpu", Text, nullable=False),
    Column("region", Text, nullable=False),
    Column("market", Text, nullable=False),
    Column("preemptions", Integer, nullable=False),
    Column("exposed_s", BigInteger, nullable=False),  # of one node that was billed, or of several together
    Column("since_at", Moment, nullable=False),
    Column("until_at", Moment, nullable=False, index=True),
)
