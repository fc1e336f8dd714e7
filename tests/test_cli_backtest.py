"""`gpubroker backtest` as a person runs it."""

import csv
import gzip
import io
import json
import sys
from decimal import Decimal

import pytest

from gpubroker.cli import main
from gpubroker.model import Offer, OfferQuery, Parsed
from gpubroker.prices.store import Store
from gpubroker.testing import FakeClock

HEADER = "seconds,available,price_usd_per_hour\n"
PATTERNS = {"a": "111101110000" * 30, "b": "000111111110" * 30}
SMALL = ("--deadline-hours", "4", "--restart-hours", ".1", "--starts", "2", "--jobs", "1")


@pytest.fixture
def run(capsys):
    """(exit code, out, err) of `gpubroker backtest ARGS`."""

    def _run(*args):
        code = main(["backtest", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return _run


@pytest.fixture
def traces(tmp_path):
    """A directory with two zones of one group, 60 h in steps of ten minutes."""
    records = []
    for name, pattern in PATTERNS.items():
        rows = "".join(f"{600 * n},{flag},\n" for n, flag in enumerate(pattern))
        (tmp_path / f"{name}.csv.gz").write_bytes(gzip.compress((HEADER + rows).encode()))
        record = {"name": name, "file": f"{name}.csv.gz", "group": "pool", "zone": name, "step_seconds": 600}
        records.append({**record, "on_demand_price": 3.0, "default_spot_price": 1.0})
    manifest = {"format": "spot-trace-csv-1", "traces": records}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_json_has_each_policy_overall_and_by_column(run, traces):
    """Alone on standard output; the default policies are all of them."""
    code, out, err = run(
        "--traces",
        traces,
        "--policy",
        "greedy,on_demand",
        "--work-over-deadline",
        ".5,.9",
        "--format",
        "json",
        *SMALL,
    )
    found = json.loads(out)
    assert (0, "") == (code, err)
    assert (["a", "b"], 16) == (found["asked"]["traces"], found["runs"])
    greedy, dear = found["policies"]
    assert ("greedy", "on_demand", 8, 0) == (
        greedy["policy"],
        dear["policy"],
        greedy["runs"],
        greedy["missed"],
    )
    assert [0.5, 0.9] == [column["work_over_deadline"] for column in greedy["by_work_over_deadline"]]
    assert 1.0 == pytest.approx(dear["over_on_demand"])
    assert 1.0 <= greedy["over_optimum"] + 1e-9 < dear["over_optimum"]


def test_csv_has_one_line_a_run(run, traces):
    """In the columns of the published runs, and some more."""
    _, out, _ = run("--traces", traces, "--policy", "greedy", "--format", "csv", "--optima", "1", *SMALL)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (2 * 7 * 2, 1) == (len(rows), sum(row["offline_optimum_over_on_demand"] != "" for row in rows))
    assert {"greedy"} == {row["policy"] for row in rows}


def test_the_table_fits_100_columns(run, traces):
    """With every column of the default grid."""
    names = "on_demand,greedy,uniform_progress,od_fallback"
    code, out, err = run("--traces", traces, "--policy", names, *SMALL)
    assert (0, 5) == (code, len(out.splitlines()))
    assert 100 >= max(map(len, (out + err).splitlines()))
    assert "28 runs a policy, 28 of them beside their optimum" in err


def test_files_and_groups_are_taken(run, traces):
    """Several files after one --traces; a group of zones is one market."""
    options = ("--policy", "greedy", "--format", "json", *SMALL)
    files = ("--traces", traces / "a.csv.gz", traces / "b.csv.gz")
    assert ["a", "b"] == json.loads(run(*files, *options)[1])["asked"]["traces"]
    found = json.loads(run(*files, "--mode", "multi", *options)[1])
    assert ["pool"] == found["asked"]["traces"]


def test_periodic_checkpoints_cost_more_than_instant_ones(run, traces):
    """The same draw, saved every half hour."""
    options = ("--traces", traces, "--policy", "greedy", "--format", "json", *SMALL)
    instant = json.loads(run(*options)[1])
    terms = ("--ckpt-interval-hours", ".5", "--ckpt-cost-hours", ".05")
    periodic = json.loads(run(*options, "--checkpoint", "periodic", *terms)[1])
    assert instant["policies"][0]["over_on_demand"] < periodic["policies"][0]["over_on_demand"]


def test_a_policy_beside_the_user_is_found(run, traces, tmp_path, monkeypatch):
    """By module:Class, in every process."""
    (tmp_path / "mine_for_test.py").write_text(
        "class Wait:\n    def reset(self, job): ...\n    def step(self, obs): return 'none'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    options = ("--policy", "mine_for_test:Wait", "--deadline-hours", "4", "--starts", "3", "--format", "json")
    code, out, err = run("--traces", traces, *options, "--jobs", "2")
    assert (0, "") == (code, err)
    assert 126 == json.loads(out)["policies"][0]["missed"]


def test_two_processes_find_what_one_finds(run, traces):
    """To the last digit, in the same order."""
    options = (
        "--traces",
        traces,
        "--policy",
        "greedy",
        "--format",
        "csv",
        "--deadline-hours",
        "4",
        "--starts",
        "3",
    )
    assert run(*options, "--jobs", "1")[1] == run(*options, "--jobs", "2")[1]


def test_a_picture_is_drawn(run, traces, tmp_path):
    """A PNG of some size."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    assert 0 == run("--traces", traces, "--policy", "greedy,on_demand", "--plot", picture, *SMALL)[0]
    blob = picture.read_bytes()
    assert (b"\x89PNG", True) == (blob[:4], len(blob) > 10_000)


def test_our_own_history_is_a_trace(run, monkeypatch, tmp_path):
    """A day of polls every ten minutes: spot that comes and goes, on-demand that stays."""
    url = f"sqlite:///{tmp_path}/prices.db"
    monkeypatch.setenv("GPUBROKER_DB_URL", url)
    clock = FakeClock()
    terms = {
        "provider": "vast",
        "gpu": "H100",
        "form_factor": "SXM",
        "gpu_count": 1,
        "vram_gib": 80,
        "region": "US",
    }
    dear = Offer(sku="d", market="on_demand", preemptible=False, usd_per_hour=Decimal(3), **terms)
    cheap = Offer(sku="s", market="spot", preemptible=True, usd_per_hour=Decimal(1), **terms)
    with Store.open(url, clock) as store:
        store.migrate()
        for look in range(145):
            there = (dear, cheap) if look % 20 < 12 else (dear,)
            parsed = Parsed(offers=there, fetched=len(there), source="test")
            store.keep(store.begin_poll("vast", OfferQuery()), parsed)
            clock.sleep(600)
    options = ("--policy", "greedy,on_demand", "--work-over-deadline", ".3", "--format", "json", *SMALL)
    code, out, _ = run("--history", "h100-sxm", *options)
    found = json.loads(out)
    assert (0, ["h100-sxm vast US"]) == (code, found["asked"]["traces"])
    assert found["policies"][0]["over_on_demand"] < 0.8 < found["policies"][1]["over_on_demand"]
    code, _, err = run("--history", "4090", *options)
    assert (2, True) == (code, "the history of 4090 has no" in err)


def test_history_of_an_empty_store_says_what_to_do(run):
    """Nothing was polled yet."""
    code, _, err = run("--history", "h100")
    assert (2, True) == (code, "poll for longer" in err)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(("--work-over-deadline", "nan"), "'nan' is not a finite number", id="nan"),
        pytest.param(("--work-over-deadline", "1.01"), "1.01 is more than 1", id="above one"),
        pytest.param(("--work-over-deadline", "0"), "0 is not above 0", id="no work"),
        pytest.param(("--work-over-deadline", ".3,,.5"), "'' is not a number", id="empty"),
        pytest.param(("--deadline-hours", "-24"), "-24 is not above 0", id="negative deadline"),
        pytest.param(("--deadline-hours", "8 hrs"), "'8 hrs' is not a number", id="unit"),
        pytest.param(
            ("--deadline-hours", "100"), "a is 60 h long: too short for a deadline of 100 h", id="long"
        ),
        pytest.param(("--restart-hours", "inf"), "'inf' is not a finite number", id="inf"),
        pytest.param(("--restart-hours", "-1"), "-1 is less than 0", id="negative restart"),
        pytest.param(("--starts", "0"), "0 is not in the range", id="no starts"),
        pytest.param(("--starts", "1000000"), "ask for fewer starts", id="too many"),
        pytest.param(("--policy", "gready"), "'gready' is not a policy", id="policy"),
        pytest.param(("--checkpoint", "periodic"), "needs --ckpt-interval-hours", id="no interval"),
        pytest.param(
            ("--checkpoint", "periodic", "--ckpt-interval-hours", "1e-8"),
            "is less than 0.01",
            id="tiny interval",
        ),
        pytest.param(("--ckpt-cost-hours", "1"), "go with --checkpoint periodic", id="instant with cost"),
        pytest.param(("--plot", "x.gif"), "the name must end in .png", id="picture kind"),
        pytest.param(("--plot", "/nowhere/x.png"), "there is no such folder", id="picture folder"),
        pytest.param(("--history", "h100"), "either --traces DIR or FILE..., or --history GPU", id="both"),
        pytest.param(("nothere.csv.gz",), "'nothere.csv.gz' does not exist", id="no file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(run, traces, args, said):
    """Never a traceback."""
    code, out, err = run("--traces", traces, *args)
    assert (2, "", True) == (code, out, said in err), err


def test_a_corrupt_trace_is_one_sentence_and_exit_2(run, traces):
    """With its name and line."""
    (traces / "a.csv.gz").write_bytes(gzip.compress((HEADER + "0,1,\n600,maybe,\n").encode()))
    code, _, err = run("--traces", traces)
    assert (2, f"gpubroker: {traces}/a.csv.gz:3: available is 'maybe', not 0 or 1\n") == (code, err)
