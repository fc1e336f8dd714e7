"""Whether the store still is what it must be: every rule of it as a query for what breaks it. Reads only.

Each check is one read transaction, so that polls may go on beside it. Where the database is too damaged to
answer one, that is told under its name, and the rest are still made. The rules are those of
docs/decisions/0003-spans.md, daily.py, exports.py and compacting.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import BigInteger, Boolean, Connection, Integer, inspect

from gpubroker.errors import SchemaTooNew, StoreError
from gpubroker.prices import daily
from gpubroker.prices.compacting import unfinished
from gpubroker.prices.daily import Where, thinned
from gpubroker.prices.database import Database
from gpubroker.prices.export import ended_up_to
from gpubroker.prices.exports import Pending
from gpubroker.prices.fastread import Run
from gpubroker.prices.polls import incomplete_of, scope_of, skips_of
from gpubroker.prices.rows import DAY_S, REVISION, listings_of, moment
from gpubroker.prices.tables import metadata

# Examples that are named of what is wrong.
_MOST = 5
# Days of each provider that are counted anew unless all are.
_SAMPLE = 5
_EVER = 1 << 60

_COPY = "restore a copy, or export what is whole and poll into a new database"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What one check found. `wrong` counts rows; 0 = all is well."""

    name: str
    looked_at: int
    wrong: int = 0
    examples: tuple[str, ...] = ()  # a few of them
    lost: str = ""  # what cannot be relied on any more, and what to do; "" where all is well
    note: str = ""  # what is worth knowing and not wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a check says of itself."""

    looked_at: int
    wrong: Sequence[str] = ()  # one text a row that is wrong, or the first few of them
    more: int = 0  # beyond those in `wrong`
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One rule. `lost` is the sentence for when it is broken."""

    name: str
    work: Callable[[Looking], Found]
    lost: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Looking:
    """What a check looks with."""

    database: Database
    connection: Connection
    run: Run
    deep: bool
    on_step: Callable[[str], None]  # hears what is looked at now

    def one(self, sql: str, values: tuple[Any, ...] = ()) -> int:
        """A count."""
        ((found,),) = self.run(sql, values)
        return int(found or 0)

    def found(self, looked_at: str, wrong: str, values: tuple[Any, ...] = (), note: str = "") -> Found:
        """By two queries: how many rows there are, and a text for each that is wrong."""
        texts = (str(text) for (text,) in self.run(wrong, values))
        first, more = _first(texts)
        return Found(looked_at=self.one(looked_at), wrong=first, more=more, note=note)


def _first(texts: Iterable[str]) -> tuple[list[str], int]:
    """The first few, and how many more there are: a table may be wrong from end to end."""
    rest = iter(texts)
    return list(islice(rest, _MOST)), sum(1 for _ in rest)


def check(
    database: Database,
    *,
    deep: bool = False,
    on_check: Callable[[str], None] = lambda name: None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Iterator[Checked]:
    """One after the other. Where the schema is not this version's, that alone. Raises SchemaTooNew."""
    for one in _checks(database):
        on_check(one.name)
        found = _made(one, database, deep, on_step)
        yield found
        if one.work is _revision and found.wrong:
            return


def names(database: Database) -> list[str]:
    """Of the checks that are made, in their order."""
    return [one.name for one in _checks(database)]


def _made(one: Check, database: Database, deep: bool, on_step: Callable[[str], None]) -> Checked:
    try:
        with database.read() as connection:
            run = partial(database.run, connection)
            looking = Looking(database=database, connection=connection, run=run, deep=deep, on_step=on_step)
            found = one.work(looking)
    except SchemaTooNew:
        raise
    except StoreError as error:
        lost = f"Nothing of it can be read: {_COPY}." if one.work is _revision else one.lost
        return Checked(name=one.name, looked_at=0, wrong=1, examples=(str(error),), lost=lost)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"what lies there cannot be read ({type(error).__name__}: {error})"
        return Checked(name=one.name, looked_at=0, wrong=1, examples=(said,), lost=one.lost)
    wrong = len(found.wrong) + found.more
    return Checked(
        name=one.name,
        looked_at=found.looked_at,
        wrong=wrong,
        examples=tuple(found.wrong[:_MOST]),
        lost=one.lost if wrong else "",
        note=found.note,
    )


# The database itself


def _revision(look: Looking) -> Found:
    found = look.database.check_schema()
    if found == REVISION:
        return Found(looked_at=1)
    return Found(looked_at=1, wrong=[f"revision {found or 'none'}, and this gpubroker has {REVISION}"])


def _schema(look: Looking) -> Found:
    """By their names; alembic's revision only says what was once made."""
    inspector, wrong, looked_at = inspect(look.connection), list[str](), 0
    there = set(inspector.get_table_names())
    for table in metadata.sorted_tables:
        looked_at += 1
        if table.name not in there:
            wrong.append(f"table {table.name} is missing")
            continue
        columns = {column["name"] for column in inspector.get_columns(table.name)}
        wrong += [f"{table.name}.{name} is missing" for name in sorted({c.name for c in table.c} - columns)]
        # By name: what an index goes by may be an expression, which cannot be compared.
        indexes = {str(name) for name in _index_names(look, table.name)}
        missing = sorted({str(index.name) for index in table.indexes} - indexes)
        looked_at += len(table.indexes)
        wrong += [f"index {name} is missing" for name in missing]
    return Found(looked_at=looked_at, wrong=wrong)


def _index_names(look: Looking, table: str) -> Iterator[str]:
    sql = "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = ?"
    if not look.database.is_sqlite:
        sql = "SELECT indexname FROM pg_indexes WHERE tablename = ? AND schemaname = current_schema()"
    for (name,) in look.run(sql, (table,)):
        yield name


def _pages(look: Looking) -> Found:
    """SQLite's own look at every page and index; the server's own record of damage."""
    if look.database.is_sqlite:
        look.on_step("every page")
        said = [str(text) for (text,) in look.run("PRAGMA integrity_check(1000)", ())]
        return Found(looked_at=look.one("PRAGMA page_count"), wrong=[] if said == ["ok"] else said)
    invalid = """
        SELECT 'index ' || indexrelid::regclass || ' is not valid' FROM pg_index
        WHERE NOT (indisvalid AND indisready) AND indrelid IN
        (SELECT oid FROM pg_class WHERE relnamespace = current_schema()::regnamespace)
        UNION ALL SELECT conrelid::regclass || ': ' || conname || ' is not validated' FROM pg_constraint
        WHERE NOT convalidated AND connamespace = current_schema()::regnamespace
        UNION ALL SELECT checksum_failures || ' pages failed their checksum' FROM pg_stat_database
        WHERE datname = current_database() AND checksum_failures > 0
    """
    return look.found("SELECT count(*) FROM pg_indexes WHERE schemaname = current_schema()", invalid)


def _references(look: Looking) -> Found:
    """Every foreign key of every table, jobs' too: SQLite keeps them only while it is told to."""
    looked_at, wrong, more = 0, list[str](), 0
    for table in metadata.sorted_tables:
        for key in (key for column in table.c for key in column.foreign_keys):
            look.on_step(table.name)
            column, there = key.parent.name, key.column
            rows = f"FROM {table.name} c WHERE c.{column} IS NOT NULL"
            parent = f"SELECT 1 FROM {there.table.name} p WHERE p.{there.name} = c.{column}"  # noqa: S608
            count = look.one(f"SELECT count(*) {rows} AND NOT EXISTS ({parent})")
            looked_at += look.one(f"SELECT count(*) {rows}")
            if count:
                wrong.append(f"{count:,} of {table.name}.{column} name no {there.table.name}")
                more += count - 1
    return Found(looked_at=looked_at, wrong=wrong, more=more)


def _types(look: Looking) -> Found:
    """SQLite would keep a text where money or a time must be."""
    looked_at, wrong, more = 0, list[str](), 0
    for table in metadata.sorted_tables:
        look.on_step(table.name)
        named = [
            column.name
            for column in table.c
            if isinstance(getattr(column.type, "impl", column.type), Integer | BigInteger | Boolean)
        ]
        if not named:
            continue
        sums = ", ".join(f"sum(typeof({name}) NOT IN ('integer', 'null'))" for name in named)
        ((rows, *counts),) = look.run(f"SELECT count(*), {sums} FROM {table.name}", ())  # noqa: S608
        looked_at += int(rows)
        for name, count in zip(named, counts, strict=True):
            if count:
                wrong.append(f"{int(count):,} of {table.name}.{name} are no whole number")
                more += int(count) - 1
    return Found(looked_at=looked_at, wrong=wrong, more=more)


# Spans

_SPANS = "SELECT count(*) FROM spans"


def _backwards(look: Looking) -> Found:
    return look.found(
        _SPANS, "SELECT 'span ' || id FROM spans WHERE until_at <= first_at OR usd_per_hour < 0 ORDER BY id"
    )


def _overlaps(look: Looking) -> Found:
    wrong = f"""
        SELECT 'offer ' || offer_id || ' at ' || first_at FROM (
            SELECT offer_id, first_at,
                   max(coalesce(until_at, {_EVER})) OVER (
                       PARTITION BY offer_id ORDER BY first_at, id
                       ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
                   ) AS taken_until
            FROM spans
        ) s WHERE taken_until > first_at
    """  # noqa: S608  a constant
    return look.found(_SPANS, wrong)


def _moments(look: Looking) -> Found:
    """A span begins and ends at kept polls of its provider; those before a thinned time are gone."""
    gone = thinned(look.run)
    looked_at, wrong, more = 0, list[str](), 0
    for (provider,) in list(look.run("SELECT DISTINCT provider FROM products ORDER BY provider", ())):
        look.on_step(provider)
        for column in ("first_at", "until_at"):
            sql = f"""
                FROM products p CROSS JOIN offers o CROSS JOIN spans s
                WHERE p.provider = ? AND o.product_id = p.id AND s.offer_id = o.id AND s.{column} >= ?
            """
            values = (provider, gone.get(provider, 0))
            looked_at += look.one(f"SELECT count(*) {sql}", values)
            missing = f"""
                SELECT 'span ' || s.id || ' of {column} ' || s.{column} {sql} AND NOT EXISTS
                (SELECT 1 FROM polls q WHERE q.provider = p.provider AND q.observed_at = s.{column})
            """  # noqa: S608
            first, rest = _first(str(text) for (text,) in look.run(missing, values))
            wrong += first
            more += rest
    return Found(looked_at=looked_at, wrong=wrong, more=more)


def _latest(look: Looking) -> Found:
    """The open spans and the current offers, the same rows both ways, as their offers have them."""
    wrong = """
        SELECT 'offer ' || s.offer_id || ' is open and not current' FROM spans s
        WHERE s.until_at IS NULL AND NOT EXISTS (
            SELECT 1 FROM latest l WHERE l.offer_id = s.offer_id AND l.rates_id = s.rates_id
            AND l.usd_per_hour = s.usd_per_hour
        )
        UNION ALL
        SELECT 'offer ' || l.offer_id || ' is current and not open' FROM latest l
        WHERE (SELECT count(*) FROM spans s WHERE s.offer_id = l.offer_id AND s.until_at IS NULL) <> 1
        UNION ALL
        SELECT 'offer ' || l.offer_id || ' is another product or machine' FROM latest l
        JOIN offers o ON o.id = l.offer_id
        WHERE o.product_id <> l.product_id OR o.machine_id <> l.machine_id
    """
    return look.found("SELECT count(*) FROM latest", wrong)


def _listings(look: Looking) -> Found:
    """What is volatile is of exactly the current offers of its (provider, GPU)."""
    sql = "SELECT p.provider, p.gpu, l.offer_id FROM latest l JOIN products p ON p.id = l.product_id"
    current: dict[tuple[str, str], set[int]] = {}
    for provider, gpu, offer_id in look.run(sql, ()):
        current.setdefault((provider, gpu), set()).add(int(offer_id))
    looked_at, wrong = 0, list[str]()
    for provider, gpu, text in look.run("SELECT provider, gpu, offers FROM listings", ()):
        looked_at += 1
        try:
            listed = set(listings_of(text))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            wrong.append(f"{provider} {gpu}: cannot be read")
        else:
            if listed != current.get((provider, gpu), set()):
                wrong.append(f"{provider} {gpu}: of other offers than are current")
        current.pop((provider, gpu), None)
    wrong += [f"{provider} {gpu}: missing" for provider, gpu in sorted(current)]
    return Found(looked_at=looked_at, wrong=wrong)


# Polls


def _polls(look: Looking) -> Found:
    sql = "SELECT id, scope, incomplete, skips, unknown_offers, observed_at, finished_at FROM polls"
    looked_at = 0
    scopes: dict[str, bool] = {}

    def wrong() -> Iterator[str]:
        nonlocal looked_at
        for poll_id, scope, incomplete, skips, unknown, observed_at, finished_at in look.run(sql, ()):
            looked_at += 1
            if scope not in scopes:
                scopes[scope] = _reads(scope_of, scope)
            reads = scopes[scope] and all(
                text in ("[]", "{}") or _reads(read, text)
                for read, text in ((incomplete_of, incomplete), (skips_of, skips), (json.loads, unknown))
            )
            if not reads or (observed_at is not None and finished_at is None):
                yield f"poll {poll_id}"

    first, more = _first(wrong())
    return Found(looked_at=looked_at, wrong=first, more=more)


def _reads(read: Callable[[str], object], text: str) -> bool:
    try:
        read(text)
    except (AttributeError, LookupError, TypeError, ValueError):
        return False
    return True


def _coverage(look: Looking) -> Found:
    """The newest kept poll of each (provider, scope), and what confirmed an offer, are kept polls."""
    wrong = """
        SELECT c.provider || ': poll ' || c.poll_id FROM coverage c LEFT JOIN polls p ON p.id = c.poll_id
        WHERE p.observed_at IS NULL OR p.provider <> c.provider OR p.scope <> c.scope OR p.observed_at <
        (SELECT max(n.observed_at) FROM polls n WHERE n.provider = c.provider AND n.scope = c.scope)
        UNION ALL
        SELECT k.provider || ': no newest poll of a scope' FROM
        (SELECT DISTINCT provider, scope FROM polls WHERE observed_at IS NOT NULL) k
        WHERE NOT EXISTS (SELECT 1 FROM coverage c WHERE c.provider = k.provider AND c.scope = k.scope)
        UNION ALL
        SELECT 'offer ' || l.offer_id || ': confirmed by poll ' || l.confirmed_by FROM latest l
        JOIN products r ON r.id = l.product_id JOIN polls p ON p.id = l.confirmed_by
        WHERE p.observed_at IS NULL OR p.provider <> r.provider
    """
    return look.found("SELECT count(*) FROM coverage", wrong)


# Days


def _rolled(look: Looking) -> Found:
    """Days that are over are counted, and no others."""
    wrong = f"""
        SELECT r.provider || ': counted up to day ' || r.until_day FROM rolled r
        WHERE r.until_day * {DAY_S} > coalesce(
            (SELECT max(observed_at) FROM polls p WHERE p.provider = r.provider), 0)
        UNION ALL
        SELECT p.provider || ': day ' || d.day FROM daily d JOIN products p ON p.id = d.product_id
        LEFT JOIN rolled r ON r.provider = p.provider
        WHERE r.until_day IS NULL OR d.day >= r.until_day OR length(d.prices) / 16 * 16 <> length(d.prices)
        UNION ALL
        SELECT s.provider || ': stays of day ' || s.day FROM stays s
        LEFT JOIN rolled r ON r.provider = s.provider
        WHERE r.until_day IS NULL OR s.day >= r.until_day OR s.ends < 0 OR s.open_s < 0
    """  # noqa: S608  a constant
    return look.found("SELECT count(*) FROM daily", wrong)


def _daily(look: Looking) -> Found:
    """What spans and polls give for a day is what was counted; a thinned day has no more than its count."""
    gone, wrong, looked_at, taken = thinned(look.run), list[str](), 0, 0
    for provider, until_day in daily.rolled(look.run).items():
        known = daily.products(look.run, Where(providers={provider}))
        first = look.one("SELECT min(observed_at) FROM polls WHERE provider = ?", (provider,)) // DAY_S
        begin = max(first, gone.get(provider, 0) // DAY_S)
        days = range(begin, until_day)
        for day in days if look.deep else _sample(days):
            look.on_step(f"{provider} {_date(day * DAY_S)}")
            looked_at += 1
            there = daily.counted_within(look.run, known, provider, day * DAY_S, (day + 1) * DAY_S)
            if there != _counted(look, known, day):
                wrong.append(f"{provider}: {_date(day * DAY_S)}")
        taken += len(days)
    note = "" if looked_at == taken else f"{looked_at} of {taken} days were counted anew: --deep does all"
    return Found(looked_at=looked_at, wrong=wrong, note=note)


def _counted(look: Looking, known: Collection[int], day: int) -> Counter[tuple[int, int]]:
    found = Counter[tuple[int, int]]()
    for product_id, prices in look.run("SELECT product_id, prices FROM daily WHERE day = ?", (day,)):
        if product_id in known:
            found.update({(product_id, usd): n for usd, n in daily.unpacked(prices)})
    return found


def _sample(days: range) -> list[int]:
    """The first, the last, and some evenly between."""
    if len(days) <= _SAMPLE:
        return list(days)
    return [days[at * (len(days) - 1) // (_SAMPLE - 1)] for at in range(_SAMPLE)]


# What others have of it


def _exports(look: Looking) -> Found:
    ends = ended_up_to(look.run)
    looked_at, wrong = 0, list[str]()
    for name, number, done, pending in look.run("SELECT name, number, done, pending FROM exports", ()):
        looked_at += 1
        try:
            reached = {str(provider): int(at) for provider, at in json.loads(done).items()}
            begun = None if pending is None else Pending(**json.loads(pending))
        except (AttributeError, TypeError, ValueError):
            wrong.append(f"{name}: cannot be read")
            continue
        ahead = [provider for provider, at in reached.items() if at > ends.get(provider, 0)]
        if ahead:
            wrong.append(f"{name}: ahead of {', '.join(sorted(ahead))}")
        elif begun is not None and (
            begun.number != number + 1
            or any(begun.up_to.get(provider, 0) < at for provider, at in reached.items())
        ):
            wrong.append(f"{name}: what it was writing does not follow what it wrote")
    return Found(looked_at=looked_at, wrong=wrong)


def _compactions(look: Looking) -> Found:
    wrong = f"""
        SELECT c.provider || ' before ' || c.until_at FROM compactions c
        LEFT JOIN rolled r ON r.provider = c.provider
        WHERE c.until_at <> c.until_at / {DAY_S} * {DAY_S}
        OR r.until_day IS NULL OR c.until_at > r.until_day * {DAY_S}
        UNION ALL
        SELECT s.provider || ': ' || s.n || ' spans are there that are told as gone' FROM (
            SELECT p.provider, count(*) AS n FROM spans s JOIN offers o ON o.id = s.offer_id
            JOIN products p ON p.id = o.product_id
            JOIN (SELECT provider, max(until_at) AS until_at FROM compactions GROUP BY provider
                  HAVING count(*) = count(ended_at)) c ON c.provider = p.provider
            WHERE s.until_at <= c.until_at GROUP BY p.provider
        ) s
    """  # noqa: S608  a constant
    notes = [
        f"{provider} has days alone before {_date(at)}" for provider, at in sorted(thinned(look.run).items())
    ]
    if open_ones := sorted(unfinished(look.run)):
        notes.append(f"gpubroker db compact has not come to its end for {', '.join(open_ones)}: run it again")
    return look.found("SELECT count(*) FROM compactions", wrong, note="; ".join(notes))


def _date(at: int) -> str:
    return f"{moment(at):%Y-%m-%d}"


def _checks(database: Database) -> Iterable[Check]:
    """In their order: what comes later is read through what comes first."""
    made = [
        Check(
            name="revision",
            work=_revision,
            lost="Nothing is lost: run gpubroker db upgrade, then this again.",
        ),
        Check(
            name="schema",
            work=_schema,
            lost=f"A part of the database is gone, with what was in it: {_COPY}.",
        ),
        Check(name="pages", work=_pages, lost=f"What lies on those pages cannot be relied on: {_COPY}."),
        Check(
            name="references",
            work=_references,
            lost=f"Those rows have lost what they belong to and are read by nobody: {_COPY}.",
        ),
        Check(name="types", work=_types, lost=f"Those figures are lost, and commands fail on them: {_COPY}."),
        Check(
            name="spans go forward",
            work=_backwards,
            lost=f"The prices of those spans count for no time: {_COPY}.",
        ),
        Check(
            name="spans do not overlap",
            work=_overlaps,
            lost=f"Those offers count twice for a while in gpubroker history by hours: {_COPY}.",
        ),
        Check(
            name="spans begin at polls",
            work=_moments,
            lost=f"When those prices began or ended is not known any more: {_COPY}.",
        ),
        Check(
            name="open is current",
            work=_latest,
            lost="A quote shows what is gone, or not what is there, and polls carry that on: restore a copy.",
        ),
        Check(
            name="listings",
            work=_listings,
            lost="Host and stock of those current offers are unknown: gpubroker poll writes them anew.",
        ),
        Check(
            name="polls",
            work=_polls,
            lost=f"What those polls looked at is not known, nor how often their prices were seen: {_COPY}.",
        ),
        Check(
            name="newest polls",
            work=_coverage,
            lost="How old some current prices are is not known: gpubroker poll writes it anew.",
        ),
        Check(
            name="days are over",
            work=_rolled,
            lost=f"Figures by day are of more or fewer days than are over: {_COPY}.",
        ),
        Check(
            name="days are counted",
            work=_daily,
            lost=f"Figures of those days are wrong, while the spans behind them are whole: {_COPY}.",
        ),
        Check(
            name="exports",
            work=_exports,
            lost="That export may miss rows: gpubroker db compact --forget-export NAME, then export it anew.",
        ),
        Check(
            name="compactions",
            work=_compactions,
            lost="Whether hours before that day are whole is not known: run gpubroker db compact.",
        ),
    ]
    return [one for one in made if database.is_sqlite or one.work is not _types]
