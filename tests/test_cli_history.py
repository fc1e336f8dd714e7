"""`gpubroker history` and `gpubroker now`: figures, points and pictures of what was polled."""

import csv
import io
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from gpubroker.cli import main
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices.store import Store
from tests.support import FakeClock
from tests.test_bill import offer

HOURS, EVERY_H = 20 * 24, 6


def price(hour):
    """$2.00, at night $1.00; for the last day half of that."""
    usd = Decimal(1) if hour % 24 < 6 else Decimal(2)
    return usd / 2 if hour >= HOURS - 24 else usd


@pytest.fixture(scope="module")
def twenty_days(tmp_path_factory):
    """The database of somebody who polled for twenty days."""
    path = tmp_path_factory.mktemp("polled") / "p.db"
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    clock = FakeClock(midnight - timedelta(hours=HOURS))
    with Store.open(f"sqlite:///{path}", clock) as store:
        store.migrate()
        for hour in range(0, HOURS, EVERY_H):
            dear = offer(provider="lambda", market="on_demand", usd_per_hour=Decimal(24), gpu_count=8)
            cheap = offer(provider="vast", market="spot", usd_per_hour=price(hour), machine_id="1")
            for one in (dear, cheap):
                poll = store.begin_poll(one.provider, OfferQuery())
                store.keep(poll, Parsed(offers=(one,) if hour % 48 or one is dear else ()))
            clock.advance(EVERY_H * 3600)
    return path


@pytest.fixture
def ask(twenty_days, tmp_path, monkeypatch, capsys):
    """`ask(*words)` -> exit code, what was printed, what was said; after twenty days of polls."""
    shutil.copy(twenty_days, tmp_path / "p.db")
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")

    def _ask(*words):
        capsys.readouterr()
        code = main(list(words))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return _ask


def test_the_table_has_a_line_a_market_with_its_figures_and_its_trend(ask):
    """For one GPU."""
    code, out, said = ask("history", "--gpu", "h100")
    assert 0 == code, said
    first, second = out.splitlines()[1:]
    assert ["lambda", "on-demand", "$3.00", "$3.00", "$3.00"] == first.split()[:5]
    assert ["vast", "spot", "$0.50", "$2.00", "$2.00"] == second.split()[:5]
    assert (1, True) == (len(set(first.split()[5])), "█" in second)
    assert "$ for one GPU-hour, from " in said
    assert max(map(len, out.splitlines())) <= 100


def test_points_are_exact_and_say_their_units(ask):
    """As CSV and as JSON, the same."""
    words = ("history", "--gpu", "h100", "--market", "spot", "--resample", "1d")
    stats = [word for stat in ("n", "p50", "available") for word in ("--stat", stat)]
    code, out, _ = ask(*words, *stats, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    told = json.loads(ask(*words, *stats, "--format", "json")[1])
    assert (0, 86400, "own") == (code, told["resample_s"], told["data"])
    assert [{k: str(v) for k, v in one.items()} for one in told["points"]] == rows
    assert 20 == len(rows)
    assert {
        "provider": "vast",
        "market": "spot",
        "observations": "3",
        "p50_usd_per_gpu_hour": "2.000000",
        "available_share": "0.750000",
    } == {k: v for k, v in rows[0].items() if k != "begin"}
    assert "1.000000" == rows[-1]["p50_usd_per_gpu_hour"]


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_the_picture_is_kept_where_it_is_wanted(ask, tmp_path, suffix):
    """Its axes say their units."""
    pytest.importorskip("matplotlib", reason="needs the extra [plot]")
    path = tmp_path / f"h100.{suffix}"
    code, out, said = ask("history", "--gpu", "h100", "--plot", str(path))
    assert (0, "", f"{path} is drawn.\n") == (code, out, said)
    kept = path.read_bytes()
    assert kept.startswith({"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!doctype html>"}[suffix])
    assert suffix == "png" or b"for one GPU-hour" in kept


def test_a_picture_is_drawn_in_the_terminal(ask):
    """Dollars at its left, days below it; each line is named by a letter where it ends."""
    code, out, said = ask("history", "--gpu", "h100", "--plot", "-")
    assert (0, "") == (code, said)
    title, *rows = out.splitlines()
    assert "H100: p50 price, $ for one GPU-hour" == title.strip()
    assert max(map(len, out.splitlines())) <= 100
    assert ["a lambda on-demand", "b vast spot"] == [row.strip() for row in rows[-2:]]
    assert rows[-3].strip().endswith(" UTC")
    ends = {row.strip()[-1]: row for row in rows[:16] if row.strip()[-1] in "ab"}
    by_height = [row[:6] for row in rows[:16] if "┤" in row]
    assert sorted(by_height, reverse=True) == by_height
    # The one costs $3, the other $0.50 at last: above and below the middle.
    assert rows.index(ends["a"]) < 8 < rows.index(ends["b"])
    assert {"⣀", "⠤", "⠒", "⠉"} & set(ends["a"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("--since", "yesterday"), "--since: 'yesterday' is neither so long ago", id="no time"),
        pytest.param(
            ("--since", "2020-01-02", "--until", "2020-01-01"), "not before --until", id="backwards"
        ),
        pytest.param(("--plot", "-", "--stat", "n"), "draws a price over time, and n is none", id="no price"),
        pytest.param(("--plot", "x.gif"), "the name must end in .png", id="no such picture"),
        pytest.param(("--plot", "nowhere/x.png"), "there is no such folder", id="no folder"),
        pytest.param(("--provider", "nobody"), "nothing was seen of that", id="nothing"),
        pytest.param(("--data", "imported"), "nothing was seen of that", id="nothing imported"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(ask, words, sentence):
    """And exit 2."""
    code, out, said = ask("history", "--gpu", "h100", *words)
    assert (2, "", True) == (code, out, sentence in said), said


def test_now_is_cheap_when_it_never_was_so_before(ask):
    """By the time of the cheapest, with how sure that is; nights are cheapest."""
    code, out, said = ask("now", "--gpu", "h100")
    assert 0 == code, said
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert ["$3.00", "50%", "50%", "50%", "50-50%", "in", "21", "d", "$3.00", "usual"] == lines[
        "lambda"
    ].split()[2:12]
    told = {
        line["provider"]: line
        for line in json.loads(ask("now", "--gpu", "h100", "--format", "json")[1])["lines"]
    }
    assert ("1.000000", "2.000000") == (
        told["vast"]["usd_per_gpu_hour"],
        told["vast"]["against"][1]["median_usd_per_gpu_hour"],
    )
    assert told["vast"]["by_hour_utc"][3] < 0.9
    assert told["vast"]["by_hour_utc"][15] > 1
    assert max(map(len, out.splitlines())) <= 100


def test_history_and_now_read_a_sqlite_file_with_nothing_heavy(ask):
    """SQLAlchemy and rich would take longer than they do."""
    code = (
        "import sys; from gpubroker.cli import main; print(main(sys.argv[1:]), *sys.modules, file=sys.stderr)"
    )
    for words in (("history", "--format", "csv"), ("now", "--format", "json")):
        ran = subprocess.run(
            [sys.executable, "-c", code, words[0], "--gpu", "h100", *words[1:]],
            capture_output=True,
            text=True,
            check=True,
        )
        status, *loaded = ran.stderr.split()
        assert ("0", True) == (status, "2." in ran.stdout), ran.stderr
        assert set() == {"sqlalchemy", "alembic", "rich", "requests", "numpy"} & set(loaded)
