"""Price histories into the store: every line counts once, and a broken one costs only itself."""

import csv
import gzip
import io
import random
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from gpubroker.cli.import_history import import_history
from gpubroker.doors import ThreadPool
from gpubroker.errors import BrokerError, ConfigError
from gpubroker.gpus import catalogue
from gpubroker.prices import tables
from gpubroker.prices.history_import import ImportResult, import_file
from gpubroker.prices.store import Store
from gpubroker.testing import FakeClock
from tests.support import PAYLOADS, SHARED

PUBLIC = SHARED / "prices" / "history_public"
ROWS = {  # as ../shared/prices/README.md says: 27,143 in all
    "gpurentalprices.csv.gz": 7621,
    "skynomad_aws_spot.csv.gz": 465,
    "skynomad_v100_availability.csv.gz": 1977,
    "tugot17_primeintellect.csv.gz": 17080,
}
PRICES = (PAYLOADS / "history" / "prices.csv").read_bytes()
AVAILABILITY = (PAYLOADS / "history" / "availability.csv").read_bytes()
HEADER, LINE, *_ = PRICES.splitlines(keepends=True)
SERIES = ("provider", "sku", "gpu", "form_factor", "gpu_count", "market", "region", "stat", "source")
FIELDS = HEADER.decode().strip().split(",")

needs_public = pytest.mark.skipif(
    not PUBLIC.is_dir(), reason="../shared/prices/history_public is not beside this checkout"
)


# For what is decided before a database is asked.
on_sqlite = pytest.mark.parametrize("empty_url", ["sqlite"], indirect=True)


@pytest.fixture
def bring(store, tmp_path):
    """Import these bytes as a file."""

    def of(content, name="history.csv"):
        (tmp_path / name).write_bytes(content)
        return import_file(store, tmp_path / name)

    return of


def stored(store):
    """(series, observed_at, usd_per_hour, available, n_offers) of each observation, in order of time."""
    of, seen = tables.series, tables.observations
    key = [of.c[name] for name in SERIES]
    query = select(*key, seen.c.observed_at, seen.c.usd_per_hour, seen.c.available, seen.c.n_offers)
    query = query.join_from(seen, of).order_by(seen.c.observed_at, of.c.provider, of.c.region)
    with store.database.read() as connection:
        found = [tuple(row) for row in connection.execute(query)]
    return [(row[: len(key)], f"{row[len(key)]:%Y-%m-%dT%H:%M:%SZ}", *row[len(key) + 1 :]) for row in found]


def only_series(store):
    """The one series that is stored, by the names of its columns."""
    ((series, *_),) = stored(store)
    return dict(zip(SERIES, series, strict=True))


def line(**changed):
    """The first line of the prices with these fields changed."""
    values = dict(zip(FIELDS, LINE.decode().strip().split(","), strict=True)) | changed
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values.values())
    return text.getvalue().encode()


def test_prices_become_series_and_observations(bring, store):
    """Literal rows: markets in our spelling, GPU names as the catalogue has them, prices exact."""
    assert ImportResult(rows=7, added=7, already_there=0, malformed=()) == bring(PRICES)
    nomad = "andylizf/skynomad-artifact@62b9aaa data/v100_spot_prices.json"
    prime = "primeintellect availability API (tugot17/gpu-price-tracker@718a831)"
    vultr = "https://api.vultr.com/v2/plans?type=all&per_page=500"
    hyper, massed = "https://www.hyperstack.cloud/gpu-pricing", "https://massedcompute.com/pricing"
    lambda_, runpod = "https://lambda.ai/service/gpu-cloud", "https://www.runpod.io/pricing"
    a100 = ("A100-80GB", "PCIe", 1)
    expected = [
        (
            ("aws", "p3.2xlarge", "V100-16GB", "SXM", 1, "spot", "us-east-1a", "change_point", nomad),
            *("2023-02-15T22:08:16Z", Decimal("1.6703"), None, None),
        ),
        (
            ("crusoecloud", "A100_80GB_PCIe", *a100, "mixed", "via-primeintellect", "min_per_gpu", prime),
            *("2025-10-19T21:01:58Z", Decimal("1.65"), None, 9),
        ),
        (
            ("lambda", "a100-pcie-80", *a100, "on_demand", "", "list_per_gpu", lambda_),
            *("2026-07-05T23:04:21Z", Decimal("1.99"), None, None),
        ),
        (
            (
                "runpod",
                "a100-pcie-80/community",
                *a100,
                "on_demand",
                "community-cloud",
                "list_per_gpu",
                runpod,
            ),
            *("2026-07-05T23:04:21Z", Decimal(1), None, None),
        ),
        (
            ("massedcompute", "a30", "A30", "unstated", 1, "on_demand", "", "list", massed),
            *("2026-07-18T18:36:52Z", Decimal("0.35"), None, None),
        ),
        (
            ("vultr", "h100", "H100", "unstated", 8, "spot", "", "list", vultr),
            *("2026-07-24T07:42:53Z", Decimal("18.4"), None, None),
        ),
        (
            ("hyperstack", "b300", "B300", "unstated", 1, "on_demand", "", "list_per_gpu", hyper),
            *("2026-07-29T08:00:50Z", Decimal("7.4"), None, None),
        ),
    ]
    assert expected == stored(store)


def test_availability_has_no_price_and_takes_the_gpu_from_its_sku(bring, store):
    """A p3.2xlarge is one V100 in SXM form; the file does not say so."""
    assert ImportResult(rows=3, added=3, already_there=0, malformed=()) == bring(AVAILABILITY)
    series = ("aws", "p3.2xlarge", "V100-16GB", "SXM", 1, "spot")
    expected = [
        ((*series, "us-east-1a", "available", ""), "2023-02-15T22:08:16Z", None, 0, None),
        ((*series, "us-east-1c", "available", ""), "2023-02-15T22:08:16Z", None, 0, None),
        ((*series, "us-east-1a", "available", ""), "2023-03-11T20:56:18Z", None, 1, None),
    ]
    assert expected == stored(store)


@on_sqlite
def test_availability_of_a_sku_nobody_knows_is_kept_without_a_gpu(bring, store):
    """Nothing is invented: no name, no form, no count."""
    content = AVAILABILITY.replace(b"p3.2xlarge", b"p99.huge")
    assert 3 == bring(content).added
    assert {("p99.huge", "", "unstated", 0)} == {series[1:5] for series, *_ in stored(store)}


@needs_public
@pytest.mark.parametrize("name", ROWS)
def test_a_public_history_goes_in_whole_and_once(name, store):
    """As many rows as the file has, none malformed; the second time none is new."""
    rows = ROWS[name]
    first = import_file(store, PUBLIC / name)
    assert ImportResult(rows=rows, added=rows, already_there=0, malformed=()) == first
    second = import_file(store, PUBLIC / name)
    assert ImportResult(rows=rows, added=0, already_there=rows, malformed=()) == second
    assert rows == store.counts()["observations"]


@needs_public
@pytest.mark.parametrize("name", [name for name in ROWS if "availability" not in name])
def test_the_sums_of_a_public_history_are_exact(name, store):
    """Per series, to the micro-dollar, against the file added up here."""
    expected, lines = Counter(), Counter()
    with gzip.open(PUBLIC / name, "rt", newline="") as file:
        for row in csv.DictReader(file):
            market = "on_demand" if row["market"] == "on-demand" else row["market"]
            key = (row["provider"], row["sku"], int(row["gpu_count"]), market)
            key += (row["region"], row["stat"], row["source"])
            expected[key] += Decimal(row["usd_per_hour"])
            lines[key] += 1
    import_file(store, PUBLIC / name)
    of, seen = tables.series.c, tables.observations.c
    key = (of.provider, of.sku, of.gpu_count, of.market, of.region, of.stat, of.source)
    query = select(*key, func.sum(seen.usd_per_hour), func.count())
    with store.database.read() as connection:
        found = connection.execute(
            query.join_from(tables.observations, tables.series).group_by(*key)
        ).fetchall()
    assert expected == {tuple(row[:-2]): row[-2] for row in found}
    assert lines == {tuple(row[:-2]): row[-1] for row in found}


@needs_public
def test_the_availability_of_a_public_history_is_kept(store):
    """As many ones and zeros as the file has in each zone."""
    name = "skynomad_v100_availability.csv.gz"
    with gzip.open(PUBLIC / name, "rt", newline="") as file:
        expected = Counter((row["region"], int(row["available"])) for row in csv.DictReader(file))
    import_file(store, PUBLIC / name)
    assert expected == Counter((series[6], available) for series, _, _, available, _ in stored(store))


def test_importing_again_adds_nothing_under_any_name(bring):
    """Plain, compressed, with Windows line ends and a byte order mark: the same lines."""
    assert 7 == bring(PRICES).added
    again = ImportResult(rows=7, added=0, already_there=7, malformed=())
    assert again == bring(PRICES)
    assert again == bring(gzip.compress(PRICES), "copy.csv.gz")
    assert again == bring(b"\xef\xbb\xbf" + PRICES.replace(b"\n", b"\r\n"), "windows.csv")


def test_a_line_twice_in_one_file_is_one_observation(bring):
    """The second counts as already there."""
    expected = ImportResult(rows=2, added=1, already_there=1, malformed=())
    assert expected == bring(HEADER + LINE + LINE)


def test_two_prices_at_one_moment_both_stay(bring, store):
    """Neither source line is more right than the other."""
    assert 2 == bring(HEADER + line(usd_per_hour="1.99") + line(usd_per_hour="2.49")).added
    assert [Decimal("1.99"), Decimal("2.49")] == sorted(usd for _, _, usd, *_ in stored(store))


def test_the_longest_line_fits_the_database(bring, store):
    """An index of PostgreSQL holds 2,700 bytes a row and compresses what it can: this it cannot."""
    dice = random.Random(7)
    sku = "".join(dice.choices("ÄÖÜäöüßçéèêàâîôûñ", k=900))
    content = line(sku=sku)
    assert 1900 < len(content) < 2000
    assert 1 == bring(HEADER + content).added
    assert sku == only_series(store)["sku"]


@on_sqlite
def test_prices_are_rounded_once_half_to_even(bring, store):
    """To the micro-dollar, never through a float."""
    prices = ["0.2014814814814815", "1.0000005", "1.0000015"]
    bring(HEADER + b"".join(line(usd_per_hour=price) for price in prices))
    expected = [Decimal("0.201481"), Decimal("1.000000"), Decimal("1.000002")]
    assert expected == sorted(usd for _, _, usd, *_ in stored(store))


@on_sqlite
def test_a_time_with_an_offset_is_kept_as_utc(bring, store):
    """10:00 at +02:00 is 08:00 UTC; a fraction of a second is cut."""
    bring(HEADER + line(observed_at="2026-07-05 10:00:00.75+02:00"))
    assert "2026-07-05T08:00:00Z" == stored(store)[0][1]


@on_sqlite
@pytest.mark.parametrize(
    ("said", "kept"),
    [
        pytest.param(("H100", "SXM"), ("H100", "SXM"), id="canonical"),
        pytest.param(("NVIDIA H100 SXM5", "unstated"), ("H100", "SXM"), id="form-only-in-the-name"),
        pytest.param(("NVIDIA H100 SXM5", "NVL"), ("H100", "NVL"), id="the-column-says-the-form"),
        pytest.param(("rtx 4090", "PCIe"), ("RTX4090", "PCIe"), id="typed-by-a-person"),
        pytest.param(("V100", "SXM"), ("V100", "SXM"), id="could-be-two-cards"),
        pytest.param(("quadro-rtx-5000", "unstated"), ("quadro-rtx-5000", "unstated"), id="unknown"),
    ],
)
def test_a_gpu_has_its_catalogue_name_where_it_has_one(bring, store, said, kept):
    """And the file's own where not: a history may know cards that we do not."""
    bring(HEADER + line(gpu=said[0], form_factor=said[1]))
    found = only_series(store)
    assert kept == (found["gpu"], found["form_factor"])


@on_sqlite
def test_every_catalogue_name_stays_as_it_is(bring, store):
    """Whatever else it might be taken for."""
    bring(HEADER + b"".join(line(gpu=name, form_factor=form) for name, form in catalogue()))
    assert set(catalogue()) == {series[2:4] for series, *_ in stored(store)}


@on_sqlite
@pytest.mark.parametrize("market", ["on-demand", "on_demand", "On-Demand"])
def test_markets_are_kept_in_one_spelling(bring, store, market):
    """However a source writes them."""
    bring(HEADER + line(market=market))
    assert "on_demand" == only_series(store)["market"]


@on_sqlite
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        pytest.param(LINE[:40] + b"\n", "3 fields instead of 12", id="too-few-fields"),
        pytest.param(LINE.strip() + b",,\n", "14 fields instead of 12", id="too-many-fields"),
        pytest.param(line(observed_at=""), "observed_at '' is no time", id="no-time"),
        pytest.param(line(observed_at="yesterday"), "observed_at 'yesterday' is no time", id="no-date"),
        pytest.param(line(observed_at="2026-07-05"), "'2026-07-05' is no time", id="only-a-date"),
        pytest.param(line(observed_at="2026-02-30T00:00:00Z"), "day is out of range", id="february-30"),
        pytest.param(line(observed_at="2026-07-05T25:00:00Z"), "hour must be in 0..23", id="hour-25"),
        pytest.param(line(observed_at="2026-07-05T23:04:21"), "has no time zone", id="naive"),
        pytest.param(line(observed_at="0001-01-01T00:00:00+10:00"), "is not in the years", id="year-1"),
        pytest.param(line(observed_at="9999-12-31T23:59:59-10:00"), "is not in the years", id="year-9999"),
        pytest.param(line(usd_per_hour=""), "no price (null)", id="price-empty"),
        pytest.param(line(usd_per_hour="null"), "price 'null' is not a number", id="price-null"),
        pytest.param(line(usd_per_hour="N/A*"), "price 'N/A*' is not a number", id="price-words"),
        pytest.param(line(usd_per_hour="-1.99"), "price -1.99 is negative", id="price-negative"),
        pytest.param(line(usd_per_hour="0"), "price is zero", id="price-zero"),
        pytest.param(line(usd_per_hour="NaN"), "price is NaN", id="price-nan"),
        pytest.param(line(usd_per_hour="Infinity"), "price is Infinity", id="price-infinite"),
        pytest.param(line(usd_per_hour="1e12"), "is beyond belief", id="price-huge"),
        pytest.param(line(usd_per_hour="1e999999999"), "is beyond belief", id="price-astronomic"),
        pytest.param(line(gpu_count="1.5"), "gpu_count '1.5' is not a whole number", id="count-fraction"),
        pytest.param(line(gpu_count="0"), "gpu_count '0' is not a whole number", id="count-zero"),
        pytest.param(line(gpu_count=""), "gpu_count '' is not a whole number", id="count-empty"),
        pytest.param(line(gpu_count="²"), "gpu_count '²' is not a whole number", id="count-superscript"),
        pytest.param(line(gpu_count="9" * 30), "is not a whole number", id="count-huge"),
        pytest.param(line(n_offers="some"), "n_offers 'some' is not a whole number", id="n-offers-words"),
        pytest.param(line(provider=" "), "provider is empty", id="no-provider"),
        pytest.param(line(gpu=""), "gpu is empty", id="no-gpu"),
        pytest.param(line(source=""), "source is empty", id="no-source"),
        pytest.param(line(market="futures"), "market 'futures' is none of spot", id="market-unknown"),
        pytest.param(line(form_factor="OAM"), "form_factor 'OAM' is none of SXM", id="form-unknown"),
        pytest.param(LINE.replace(b"lambda", b"lamb\xffda"), "byte 0xff is not UTF-8", id="not-utf-8"),
        pytest.param(LINE.replace(b"lambda", b"lamb\0da"), "a control character, 0x00", id="nul"),
        pytest.param(LINE.replace(b"lambda", b"lamb\rda"), "a control character, 0x0d", id="bare-return"),
        pytest.param(LINE.replace(b"lambda", b'"lambda', 1), "is not CSV: unexpected end", id="open-quote"),
        pytest.param(line(sku="x" * 5_000_000), "a line of 2000 bytes or more", id="endless"),
        pytest.param(b"<html>\n", "1 fields instead of 12", id="html"),
    ],
)
def test_a_malformed_line_is_reported_with_its_number_and_costs_only_itself(bring, broken, reason):
    """The header is line 1; blank lines count as lines and are no rows."""
    result = bring(HEADER + LINE + b"\n" + broken + line(usd_per_hour="2.01"))
    assert (3, 2, 0) == (result.rows, result.added, result.already_there)
    ((number, said),) = result.malformed
    assert 4 == number
    assert reason in said
    assert len(said) < 200


@on_sqlite
@pytest.mark.parametrize("available", ["", "2", "yes", "-1"])
def test_availability_is_yes_or_no(bring, available):
    """1 or 0; all else is malformed."""
    result = bring(AVAILABILITY + f"2023-03-12T00:00:00Z,aws,p3.2xlarge,us-east-1a,{available}\n".encode())
    assert ((5, f"available {available!r} is none of 0, 1"),) == result.malformed
    assert 3 == result.added


@on_sqlite
def test_the_last_line_needs_no_line_end(bring):
    """Nor is one lost for it."""
    assert 7 == bring(PRICES.rstrip()).added


@on_sqlite
def test_a_header_alone_is_an_empty_history(bring):
    """No rows, no error."""
    assert ImportResult(rows=0, added=0, already_there=0, malformed=()) == bring(HEADER)


def long_history(lines):
    """So many lines that compression leaves several blocks to cut between."""
    dice = random.Random(7)
    rows = (line(usd_per_hour=f"{dice.uniform(1, 9):.6f}", region=f"{dice.random()}") for _ in range(lines))
    return HEADER + b"".join(rows)


def test_two_imports_of_one_file_at_once_add_each_line_once(store, tmp_path):
    """Whichever of them adds it."""
    path = tmp_path / "history.csv"
    path.write_bytes(long_history(3000))
    outcomes = ThreadPool().map(lambda _: import_file(store, path), range(2), 60)
    assert [None, None] == [outcome.error for outcome in outcomes]
    assert 3000 == sum(outcome.value.added for outcome in outcomes) == store.counts()["observations"]


@on_sqlite
def test_a_truncated_gzip_keeps_what_came_before_and_says_where_it_broke(bring):
    """A download cut short: a line that is only half there does not go in."""
    whole = gzip.compress(long_history(2000))
    result = bring(whole[: len(whole) // 2], "cut.csv.gz")
    ((number, said),) = result.malformed
    assert "the file breaks off here, nothing after it was read: Compressed file ended" in said
    assert result.added > 500
    assert (result.added + 1, result.added + 2) == (result.rows, number)
    assert ImportResult(
        rows=2000, added=2000 - result.added, already_there=result.added, malformed=()
    ) == bring(whole, "whole.csv.gz")


@on_sqlite
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda packed: packed[:-8] + bytes(8), id="checksum"),
        pytest.param(lambda packed: packed + b"more", id="trailing-garbage"),
        pytest.param(lambda packed: packed[:-8], id="no-trailer"),
    ],
)
def test_a_damaged_end_of_a_gzip_is_reported_after_its_last_line(bring, damage):
    """All lines were read; that they are the right ones is not sure."""
    result = bring(damage(gzip.compress(PRICES)), "damaged.csv.gz")
    assert (8, 7, 9) == (result.rows, result.added, result.malformed[0][0])


@on_sqlite
def test_damage_inside_a_gzip_never_ends_in_a_traceback(bring):
    """Any byte may be another: some lines go in, and the counts add up."""
    whole = gzip.compress(long_history(50))
    for position in range(10, len(whole), 97):
        damaged = whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]
        try:
            result = bring(damaged, "damaged.csv.gz")
        except ConfigError:
            continue
        assert result.rows == result.added + result.already_there + len(result.malformed)
        assert result.malformed


@on_sqlite
@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        pytest.param(b"", "empty.csv", "is no price history: it is empty", id="empty"),
        pytest.param(b"", "empty.csv.gz", "is no price history: it is empty", id="empty-gzip"),
        pytest.param(gzip.compress(b""), "none.csv.gz", "it is empty", id="gzip-of-nothing"),
        pytest.param(LINE, "headless.csv", "its first line is neither observed_at,provider", id="no-header"),
        pytest.param(b"a,b,c\n1,2,3\n", "other.csv", "its first line is neither", id="other-columns"),
        pytest.param(b"\n" + PRICES, "late.csv", "its first line is neither", id="blank-first"),
        pytest.param(b"\xff\xfe\0\r\n", "binary.csv", "its first line is neither", id="binary"),
        pytest.param(bytes(100_000), "zeros.csv", "a line of 2000 bytes or more", id="endless"),
        pytest.param(gzip.compress(PRICES)[:15], "stub.csv.gz", "the file breaks off here", id="cut-at-once"),
        pytest.param(PRICES, "plain.csv.gz", "Not a gzipped file", id="not-compressed"),
        pytest.param(gzip.compress(PRICES), "packed.csv", "its first line is neither", id="compressed"),
    ],
)
def test_what_is_no_history_is_refused_in_one_sentence(bring, store, tmp_path, content, name, reason):
    """It names the file, and nothing goes in."""
    with pytest.raises(ConfigError) as caught:
        bring(content, name)
    assert str(caught.value).startswith(f"{tmp_path / name} is no price history: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert 0 == store.counts()["series"]


@on_sqlite
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        pytest.param("folder.csv", "cannot be read: Is a directory", id="directory"),
        pytest.param("folder.csv.gz", "cannot be read: Is a directory", id="directory-gz"),
        pytest.param("nowhere.csv", "cannot be read: No such file or directory", id="missing"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_name(store, tmp_path, path, reason):
    """As the system says it."""
    for folder in ("folder.csv", "folder.csv.gz"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ConfigError, match=f"{path} {reason}"):
        import_file(store, tmp_path / path)


@on_sqlite
def test_a_file_that_may_not_be_read_is_said_with_its_name(store, tmp_path, monkeypatch):
    """Root may read everything: the refusal is played."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"mine.csv cannot be read: Permission denied"):
        import_file(store, tmp_path / "mine.csv")


def test_the_command_reports_the_line_and_exits_2(tmp_path, monkeypatch):
    """The rest went in all the same."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/prices.db")
    path = tmp_path / "history.csv"
    path.write_bytes(PRICES + line(usd_per_hour="-1"))
    result = CliRunner().invoke(import_history, [str(path), "--format", "json"])
    assert 2 == result.exit_code
    assert f"{path}:9: price -1 is negative" in result.stderr
    assert '"added": 7' in result.stdout


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    made = Store.open(f"sqlite:///{tmp_path_factory.mktemp('fuzzed')}/prices.db", FakeClock())
    made.migrate()
    yield made
    made.close()


def mutated(data, changes):
    """A sound line with some bytes replaced."""
    changed = bytearray(data)
    for position, byte in changes:
        changed[position % len(changed)] = byte
    return bytes(changed)


SPOILT = st.builds(
    mutated,
    st.sampled_from(PRICES.splitlines(keepends=True)[1:]),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=4),
)
VALUES = st.fixed_dictionaries({}, optional={name: st.text(max_size=30) for name in FIELDS})
ODD = VALUES.map(lambda values: line(**{k: v.encode(errors="replace").decode() for k, v in values.items()}))


@given(lines=st.lists(st.one_of(st.binary(max_size=300), SPOILT, ODD), max_size=8), packed=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_end_in_a_traceback_and_the_counts_always_add_up(shared_store, tmp_path, lines, packed):
    """After a sound header anything may follow."""
    content = HEADER + b"\n".join(lines)
    path = tmp_path / ("fuzzed.csv.gz" if packed else "fuzzed.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    result = import_file(shared_store, path)
    said = [number for number, raw in enumerate(content.split(b"\n"), 1) if raw.strip()]
    assert len(said) - 1 == result.rows
    assert result.rows == result.added + result.already_there + len(result.malformed)
    assert {number for number, _ in result.malformed} <= set(said[1:])


@given(content=st.binary(max_size=300), name=st.sampled_from(["any.csv", "any.csv.gz"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_of_any_bytes_raises_nothing_but_our_own_errors(shared_store, tmp_path, content, name):
    """Not even one that begins like a history."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BrokerError):
        import_file(shared_store, tmp_path / name)
