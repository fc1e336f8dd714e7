"""The tables of jobs and of what was rented for them, beside the price store's, in one database."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    false,
)

from gpubroker.prices.tables import Id, Moment, Money, metadata, text_column

jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("spec", Text, nullable=False),  # JSON of the JobSpec; names of secrets, never their values
    Column("state", Text, nullable=False),  # records.JobState
    text_column("reason"),
    Column("created_at", Moment, nullable=False),
    Column("ended_at", Moment),  # NULL = not over
    Column("unattended", Boolean, nullable=False, server_default=false()),  # a supervisor has it, no terminal
    Column("supervisor_id", Text),  # who has it while that one's lease lasts; NULL = nobody yet
    Column("claims", Integer, nullable=False, server_default="0"),  # how often it went to a supervisor
    text_column("wanted"),  # records.Wanted: the state that it is to be brought to; "" = its own end
    text_column("wanted_why"),
    Column("wanted_at", Moment),
    Column("told_percent", Integer, nullable=False, server_default="0"),  # of its budget, in events so far
    Index("ix_jobs_state", "state"),
)
# Processes that run jobs which no terminal has. One whose time is over has lost them to whoever is there.
supervisors = Table(
    "supervisors",
    metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("started_at", Moment, nullable=False),
    Column("until_at", Moment, nullable=False),  # by the database's clock
)
# What happened and why, for people. Rows are only ever added.
events = Table(
    "events",
    metadata,
    Column("id", Id, primary_key=True),
    Column("at", Moment, nullable=False),
    Column("job_id", Text, ForeignKey("jobs.id")),  # NULL = of no one job
    Column("attempt_id", BigInteger),  # NULL = of no one node
    Column("kind", Text, nullable=False),  # events.Kind
    Column("text", Text, nullable=False),
    Index("ix_events_job", "job_id", "id"),
)
# How far a reader of the events has come.
cursors = Table(
    "cursors",
    metadata,
    Column("name", Text, primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("moved_at", Moment, nullable=False),
)
# One row is one intent to rent one node: written before the call, so that no crash hides a node.
attempts = Table(
    "attempts",
    metadata,
    Column("id", Id, primary_key=True),
    Column("job_id", Text, ForeignKey("jobs.id"), nullable=False),
    Column("epoch", Integer, nullable=False),  # counts the job's attempts; fences its checkpoints
    Column("tag", Text, nullable=False, unique=True),
    Column("provider", Text, nullable=False),
    Column("sku", Text, nullable=False),
    Column("gpu", Text, nullable=False),
    Column("form_factor", Text, nullable=False),
    Column("vram_gib", Integer, nullable=False),
    Column("gpu_count", Integer, nullable=False),
    Column("market", Text, nullable=False),
    Column("region", Text, nullable=False),
    text_column("zone"),
    text_column("machine_id"),
    Column("usd_per_hour", Money, nullable=False),  # all that is billed by the hour
    Column("bid_usd_per_hour", Money),  # NULL = not a bid
    Column("billing_increment_s", Integer, nullable=False),
    Column("minimum_s", BigInteger, nullable=False),
    Column("intended_at", Moment, nullable=False),
    Column("node_id", Text),  # NULL = not known to exist
    Column("running_at", Moment),  # NULL = never seen running
    Column("ended_at", Moment),  # NULL = may be billing
    text_column("end_reason"),
    Column("usd_estimated", Money),  # NULL until it has ended
    Column("usd_settled", Money),  # NULL = the vendor has not said
    Column("work_lost_s", Integer),  # run since the last save; NULL until it has ended, or nobody knows
    Column("held_usd_per_hour", Money, nullable=False, server_default="0"),  # its disk, while it does not run
    Column("stopped_at", Moment),  # NULL = not seen stopped
    text_column("end_kind"),  # records.EndKind; "" = it has not ended, or was never created
    UniqueConstraint("job_id", "epoch"),
    Index("ix_attempts_open", "ended_at"),
)
# What was published, still kept or not.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id"), primary_key=True),
    Column("epoch", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("step", BigInteger),  # NULL = its name has no number
    Column("bytes", BigInteger, nullable=False),
    Column("published_at", Moment, nullable=False),  # by the node's clock
    Column("place", Text, nullable=False),
)
# Checkpoints that an attempt found damaged or stale when it looked for one to go on from.
passed_over = Table(
    "passed_over",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id"), primary_key=True),
    Column("generation", Text, primary_key=True),  # epoch/number, as its node names it
    Column("epoch", Integer, nullable=False),  # of the attempt that found it first
    Column("place", Text, nullable=False),
    Column("reason", Text, nullable=False),
)
# Machines that failed a preflight, for a while.
avoided = Table(
    "avoided",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("machine_id", Text, primary_key=True),
    Column("code", Text, nullable=False),  # verdict.Reason
    Column("reason", Text, nullable=False),
    Column("until_at", Moment, nullable=False),
)
# What a person wants to hear of when a price comes below a limit.
alerts = Table(
    "alerts",
    metadata,
    Column("id", Id, primary_key=True),
    Column("created_at", Moment, nullable=False),
    Column("wanted", Text, nullable=False),  # wanted.Wanted.kept
    Column("usd_per_gpu_hour", Money, nullable=False),  # the limit
    Column("is_below", Boolean, nullable=False, server_default=false()),  # since it was told; false = armed
    Column("told", Integer, nullable=False, server_default="0"),  # how often
    Column("told_at", Moment),  # NULL = never
    sqlite_autoincrement=True,  # an event names an alert: no number comes twice
)
