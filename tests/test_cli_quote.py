"""`gpubroker quote` as a person runs it: vendors away, vendors on loopback, broken vendors, bad input."""

import csv
import io
import json
import re
from decimal import Decimal

import pytest

from gpubroker.cli import main
from gpubroker.prices import market
from gpubroker.testing import BROKEN, Answer, serving
from tests.loopback import ok, vendor
from tests.support import PAYLOADS

FIVE = {"vast", "runpod", "lambda", "modal", "aws"}
CLOSED = "http://127.0.0.1:9"  # discard: nobody listens


def away(monkeypatch):
    for name in ("VAST", "RUNPOD", "LAMBDA", "AWS_FEEDS"):
        monkeypatch.setenv(f"GPUBROKER_{name}_URL", CLOSED)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line with every vendor away unless the test says else; (exit code, out, err)."""
    away(monkeypatch)

    def _run(*args):
        code = main(list(args))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return _run


def quotes(run, *args):
    code, out, _ = run("quote", "--gpu", "h100", "--hours", "8", "--format", "json", *args)
    assert 0 == code
    return json.loads(out)


def file(name):
    return json.loads((PAYLOADS / name).read_text())


def test_offline_the_price_book_answers_for_all_five(run):
    """No network and no account: every row is dated or said to be undated."""
    answer = quotes(run, "--offline")
    assert FIVE <= {q["provider"] for q in answer["quotes"]}
    assert not any(q["live"] for q in answer["quotes"])
    for q in answer["quotes"]:
        assert re.match(r"list price, (\d{4}-\d\d-\d\d|undated): ", q["source"])
        assert ("undated" in q["source"]) == (q["as_of"] is None)


def test_the_lines_of_every_quote_add_up_to_its_total(run):
    """To the micro-dollar, as strings."""
    answer = quotes(run, "--offline", "--egress-gb", "123.4", "--ingress-gb", "7", "--disk-gb", "500")
    for q in answer["quotes"]:
        assert Decimal(q["total_usd"]) == sum(Decimal(line["usd"]) for line in q["lines"])
        assert all(re.fullmatch(r"\d+\.\d{6}", line["usd"]) for line in q["lines"])
    totals = [Decimal(q["total_usd"]) for q in answer["quotes"] if q["stock"] != "none"]
    assert sorted(totals) == totals


def test_vendors_that_are_away_are_named_and_the_book_answers(run):
    """Exit 0, all five there, and each failure said."""
    answer = quotes(run)
    assert FIVE <= {q["provider"] for q in answer["quotes"]}
    problems = {p["provider"]: p["reason"] for p in answer["problems"]}
    assert "refused" in problems["vast"]
    assert "refused" in problems["aws"]
    assert "LAMBDA_API_KEY is not set" in problems["lambda"]
    assert "MODAL_TOKEN_ID" in problems["modal"]


def test_a_host_that_was_away_is_not_tried_again_for_a_minute(run, monkeypatch):
    """The failure is remembered in the store, for every process."""
    quotes(run)
    with vendor({}) as server:
        monkeypatch.setenv("GPUBROKER_VAST_URL", server.url)
        answer = quotes(run)
    assert [] == server.asked
    assert "not asked again for" in {p["provider"]: p["reason"] for p in answer["problems"]}["vast"]


def test_a_live_vendor_is_polled_and_then_read_from_the_store(run, monkeypatch):
    """The same command polls it and quotes its prices; the second one asks nobody."""
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    types = {("GET", "/api/v1/instance-types"): ok(file("lambda/instance_types.json"))}
    with vendor(types) as server:
        monkeypatch.setenv("GPUBROKER_LAMBDA_URL", server.url)
        first = quotes(run, "--provider", "lambda")
        second = quotes(run, "--provider", "lambda")
    assert 1 == len([a for a in server.asked if a.method == "GET"])
    assert first["quotes"] == second["quotes"]
    live = [q for q in first["quotes"] if q["live"]]
    assert live
    assert all(not q["stale"] for q in live)


def respond_as_all_vendors(request):
    """vast, RunPod without a key, Lambda and the AWS feeds, on one port."""
    bodies = {
        "/api/v0/bundles/": "vast/bundles_synthetic.json",
        "/graphql": "runpod/gpu_types_synthetic.json",
        "/api/v1/instance-types": "lambda/instance_types.json",
        "/spot.json": "aws/spot.json",
        "/spot-advisor-data.json": "aws/spot-advisor-data.json",
    }
    if request.path not in bodies:
        return Answer(status=404, body="not here")
    return Answer(body=(PAYLOADS / bodies[request.path]).read_text())


def test_four_vendors_on_loopback_are_polled_and_quoted(run, monkeypatch):
    """The same command; what each sent, to the micro-dollar."""
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    with serving(respond_as_all_vendors) as url:
        for name in ("VAST", "RUNPOD", "LAMBDA", "AWS_FEEDS"):
            monkeypatch.setenv(f"GPUBROKER_{name}_URL", url)
        answer = quotes(run)
    live = {q["provider"] for q in answer["quotes"] if q["live"]}
    assert {"vast", "runpod", "lambda", "aws"} <= live
    assert ["modal"] == [p["provider"] for p in answer["problems"] if "not set" in p["reason"]]
    assert all(skip["reason"] and skip["id"] for skip in answer["skipped"])
    assert not any(q["provider"] == "vast" and not q["live"] for q in answer["quotes"])


@pytest.mark.parametrize("what", BROKEN, ids=lambda what: what.replace(" ", "-"))
def test_vendors_that_answer_nonsense_are_problems_not_tracebacks(run, monkeypatch, what):
    """HTML, cut JSON, nulls, 401, 429, 500 from every vendor at once: the price book answers."""
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    with serving(lambda _: BROKEN[what]) as url:
        for name in ("VAST", "RUNPOD", "LAMBDA", "AWS_FEEDS"):
            monkeypatch.setenv(f"GPUBROKER_{name}_URL", url)
        monkeypatch.setattr(market, "REFRESH_S", 2.0)
        answer = quotes(run)
    assert FIVE <= {q["provider"] for q in answer["quotes"]}
    assert {"vast", "runpod", "lambda", "aws"} <= {p["provider"] for p in answer["problems"]}
    assert "secret-key" not in json.dumps(answer)


def test_a_hanging_vendor_costs_only_itself(run, monkeypatch):
    """What is late is marked and left to the next poll."""
    monkeypatch.setattr(market, "REFRESH_S", 8.0)
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    types = {("GET", "/api/v1/instance-types"): ok(file("lambda/instance_types.json"))}
    with vendor({("POST", "/api/v0/bundles/"): Answer(hangs=True)}) as slow, vendor(types) as quick:
        monkeypatch.setenv("GPUBROKER_VAST_URL", slow.url)
        monkeypatch.setenv("GPUBROKER_LAMBDA_URL", quick.url)
        answer = quotes(run)
    assert "vast" in {p["provider"] for p in answer["problems"]}
    assert any(q["live"] and q["provider"] == "lambda" for q in answer["quotes"])


def test_the_table_fits_100_columns_and_ends_with_advice(run):
    """And colour stays on terminals."""
    code, out, _ = run("quote", "--gpu", "h100", "--hours", "8", "--offline")
    assert 0 == code
    assert max(map(len, out.splitlines())) <= 100
    assert "\x1b" not in out
    assert "Take " in out
    assert "listed 2026" in " ".join(out.split())


def test_explain_shows_arithmetic_and_what_was_left_out(run):
    """Every line with its source."""
    _, out, _ = run("quote", "--gpu", "h100", "--hours", "8", "--count", "8", "--offline", "--explain")
    text = " ".join(out.split())
    assert "8 h x $" in text
    assert "Left out:" in text
    assert "too few GPUs: 1 of 8" in text


def test_csv_has_a_header_and_a_row_a_quote(run):
    """For spreadsheets."""
    code, out, _ = run("quote", "--gpu", "h100", "--hours", "8", "--offline", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert 0 == code
    assert FIVE <= {row["provider"] for row in rows}


def test_a_region_narrows_and_modal_pays_its_multiplier(run):
    """1.15 for a broad region."""
    everywhere = quotes(run, "--offline", "--provider", "modal")["quotes"][0]
    in_us = quotes(run, "--offline", "--provider", "modal", "--region", "us")["quotes"][0]
    assert Decimal(everywhere["usd_per_hour"]) * Decimal("1.15") == Decimal(in_us["usd_per_hour"])


@pytest.mark.parametrize(
    ("args", "word"),
    [
        pytest.param(["--gpu", "h1000", "--hours", "8"], "did you mean H100", id="unknown GPU"),
        pytest.param(["--gpu", "h100"], "--hours", id="no hours"),
        pytest.param(["--hours", "8"], "--gpu", id="no GPU"),
        pytest.param(["--gpu", "h100", "--hours", "0"], "above 0", id="zero hours"),
        pytest.param(["--gpu", "h100", "--hours", "-1"], "above 0", id="negative hours"),
        pytest.param(["--gpu", "h100", "--hours", "nan"], "finite", id="NaN hours"),
        pytest.param(["--gpu", "h100", "--hours", "1e99"], "more than", id="absurd hours"),
        pytest.param(["--gpu", "h100", "--hours", "1e-99999999"], "too small", id="an exponent that would hang"),
        pytest.param(["--gpu", "h100", "--hours", "1_0"], "not a number", id="an underscore"),
        pytest.param(["--gpu", "h100", "--hours", "eight"], "not a number", id="words"),
        pytest.param(["--gpu", "h100", "--hours", "8", "--count", "0"], "--count", id="no GPUs"),
        pytest.param(["--gpu", "h100", "--hours", "8", "--market", "free"], "spot", id="unknown market"),
        pytest.param(["--gpu", "h100", "--hours", "8", "--max-age", "30"], "duration", id="age without unit"),
        pytest.param(
            ["--gpu", "h100", "--hours", "8", "--provider", "acme", "--offline"], "acme", id="unknown provider"
        ),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence_and_exit_2(run, args, word):
    """Never a traceback."""
    code, out, err = run("quote", *args)
    assert (2, "") == (code, out)
    assert word in err
    assert "Traceback" not in err


def test_nothing_feasible_is_exit_3_and_says_why(run):
    """64 H100 in one offer: nobody sells that."""
    code, out, err = run("quote", "--gpu", "h100", "--hours", "8", "--count", "64", "--offline")
    assert (3, "") == (code, out)
    assert "too few GPUs: 8 of 64" in err


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--hours", "100000"), id="eleven years"),
        pytest.param(("--hours", "8", "--preemptions-per-hour", "1000"), id="hopeless spot"),
        pytest.param(
            ("--hours", "8", "--checkpoint-gb", "10000TB", "--checkpoint-at", "aws"), id="huge checkpoint"
        ),
        pytest.param(("--hours", "8", "--checkpoint-every", "1s"), id="saving all the time"),
        pytest.param(
            ("--hours", "8", "--egress-gb", "9999999", "--ingress-gb", "9999999"), id="all of it moves"
        ),
    ],
)
def test_extreme_jobs_are_priced_all_the_same(run, words):
    """In a table of 100 columns and in JSON without a figure that is none."""
    code, out, _ = run("quote", "--gpu", "h100", "--offline", *words)
    assert (0, True) == (code, max(map(len, out.splitlines())) <= 100)
    code, out, _ = run("quote", "--gpu", "h100", "--offline", *words, "--format", "json")
    assert 0 == code
    assert "Infinity" not in out
    assert "inf" not in {str(q["p90_usd"]) for q in json.loads(out)["quotes"]}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("--hours", "8", "--bound", "memory"), "--bound goes with --work", id="bound"),
        pytest.param(("--hours", "8", "--job", "x"), "--job goes with --work", id="job"),
        pytest.param(("--hours", "8", "--work", "8h@h100-sxm"), "say how much work", id="both"),
        pytest.param(("--hours", "8", "--checkpoint-every", "0s"), "less than 1s", id="no interval"),
        pytest.param(("--work", "8h@h100"), "say which", id="which h100"),
    ],
)
def test_work_that_is_not_clear_is_refused(run, words, sentence):
    """One sentence, exit 2."""
    code, _, err = run("quote", "--gpu", "h100", "--offline", *words)
    assert 2 == code
    assert sentence in err
