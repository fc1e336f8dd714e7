"""`gpubroker plan`, as a person and as a script use it."""

import csv
import io
import json
import re

import pytest

from gpubroker.cli import main

JOB = """
name = "llama"
[gpu]
name = "h100"
[work]
hours = 40
[limits]
deadline = "60h"
budget_usd = 200
[checkpoint]
size = "30GB"
save_time = "40s"
store = "s3://bucket/llama"
"""
FLAGS = (
    "--gpu",
    "h100",
    "--hours",
    "40",
    "--checkpoint-gb",
    "30",
    "--checkpoint-save",
    "40s",
    "--checkpoint-at",
    "aws",
)


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path):
    """Run it on an empty store: the price book answers. Gives exit code, output, messages."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/prices.db")

    def _plan(*words):
        code = main(["plan", *words, "--offline"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return _plan


def test_a_job_file_and_the_same_options_give_the_same_plan(plan, tmp_path):
    """One question, asked in two ways."""
    (tmp_path / "job.toml").write_text(JOB)
    code, by_file, _ = plan(str(tmp_path / "job.toml"), "--format", "json")
    again, by_flags, _ = plan(*FLAGS, "--deadline", "60h", "--budget-usd", "200", "--format", "json")
    assert (0, 0) == (code, again)
    assert json.loads(by_file)["strategies"] == json.loads(by_flags)["strategies"]


def test_json_has_every_strategy_with_its_chances(plan):
    """Money as decimal strings; the first keeps the limits."""
    code, out, _ = plan(*FLAGS, "--deadline", "60h", "--format", "json")
    answer = json.loads(out)
    first = answer["strategies"][0]
    assert (0, True, True) == (code, answer["feasible"], first["keeps_limits"])
    assert first["expected_usd"].count(".") == 1
    assert {"spot, then on demand", "on demand", "spot", "serverless"} <= {
        s["kind"] for s in answer["strategies"]
    }
    assert all(0 <= s["chance"] <= 1 for s in answer["strategies"])
    fallen = next(s for s in answer["strategies"] if s["kind"] == "spot, then on demand")
    assert 1.0 == fallen["deadline_chance"]
    assert fallen["fallback"]["market"] == "on_demand"


def test_csv_has_a_row_a_strategy(plan):
    """The same figures as JSON."""
    _, out, _ = plan(*FLAGS, "--format", "csv")
    _, again, _ = plan(*FLAGS, "--format", "json")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [s["expected_usd"] for s in json.loads(again)["strategies"]] == [r["expected_usd"] for r in rows]


def test_the_table_fits_100_columns_and_says_why(plan):
    """One sentence with what to take, what it costs, and against what."""
    code, out, _ = plan(*FLAGS, "--deadline", "60h")
    assert 0 == code
    assert max(map(len, out.splitlines())) <= 100
    assert "Take " in out
    assert "to keep a deadline of 60.0 h" in " ".join(out.split())


def test_prices_of_long_ago_are_said_where_the_plan_is_read(plan):
    """In the sentence, in the table, and for each leg in JSON, the fallback's too."""
    _, out, _ = plan(*FLAGS, "--deadline", "60h")
    text = " ".join(out.split())
    assert re.search(r"That rests on a list price (from \d+ days ago|without a date): check it", text)
    assert re.search(r"listed, undated|listed \d+d ago", text)
    _, out, _ = plan(*FLAGS, "--deadline", "60h", "--format", "json")
    answer = json.loads(out)
    assert "rests on a list price" in answer["advice"]
    legs = [s[leg] for s in answer["strategies"] for leg in ("first", "fallback") if s[leg] is not None]
    assert all(leg["source"].startswith("list price, ") and "as_of" in leg for leg in legs)


def test_explain_tells_bid_interval_and_switch(plan):
    """What a person would need to do it by hand."""
    _, out, _ = plan(*FLAGS, "--deadline", "60h", "--explain")
    text = " ".join(out.split())
    assert "bid $" in text
    assert "a checkpoint every" in text
    assert "before the deadline if nothing is saved by then" in text


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        pytest.param(("--deadline", "39h"), "what would do: a deadline of 4", id="deadline"),
        pytest.param(("--budget-usd", "5"), "what would do: a budget of $", id="budget"),
        pytest.param(("--deadline", "39h", "--budget-usd", "5"), "what would do: 4", id="both"),
    ],
)
def test_what_cannot_be_kept_is_exit_3_with_what_would_do(plan, limits, sentence):
    """Forty hours in 39, or for five dollars."""
    code, _, err = plan(*FLAGS, *limits)
    assert 3 == code
    assert sentence in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("--gpu", "h100", "--hours", "-1"), "-1 is not above 0", id="negative hours"),
        pytest.param(("--gpu", "h100", "--hours", "nan"), "not a finite number", id="nan"),
        pytest.param(
            ("--gpu", "h100", "--hours", "8", "--deadline", "8 hrs"), "'8 hrs' is not a time", id="hrs"
        ),
        pytest.param(
            ("--gpu", "h100", "--hours", "8", "--deadline", "2020-01-01T00:00Z"), "has passed", id="past"
        ),
        pytest.param(("--gpu", "h100", "--work", "8parsecs"), "not an amount of work", id="unit"),
        pytest.param(("--gpu", "h100"), "say how much work", id="no work"),
        pytest.param(("--hours", "8"), "say which GPU", id="no gpu"),
        pytest.param((*FLAGS, "--checkpoint-at", "mars"), "no store 'mars'", id="store"),
        pytest.param((*FLAGS, "--budget-usd", "inf"), "not a finite number", id="budget"),
        pytest.param(("no-such-file.toml",), "No such file", id="no file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(plan, words, sentence):
    """Never a traceback."""
    code, out, err = plan(*words)
    assert (2, "") == (code, out)
    assert sentence in err
    assert "Traceback" not in err


def test_a_size_without_a_unit_in_a_job_file_is_refused(plan, tmp_path):
    """Nobody knows whether 30 are megabytes."""
    (tmp_path / "job.toml").write_text(JOB.replace('"30GB"', "30"))
    code, _, err = plan(str(tmp_path / "job.toml"))
    assert (2, 1) == (code, err.count("\n"))
    assert "checkpoint.size: '30' has no unit" in err


def test_a_job_file_and_options_of_the_job_together_are_refused(plan, tmp_path):
    """Which of the two would count?"""
    (tmp_path / "job.toml").write_text(JOB)
    code, _, err = plan(str(tmp_path / "job.toml"), "--gpu", "h100")
    assert 2 == code
    assert "--gpu belongs there" in err


def test_any_gpu_with_the_memory_can_win(plan):
    """Work on a reference card, converted: the plan says how."""
    code, out, _ = plan("--min-vram", "48", "--work", "8h@h100-sxm", "--deadline", "40h")
    assert 0 == code
    assert "converted by published figures" in " ".join(out.split())


def test_a_plan_says_where_a_node_could_not_end_its_own_billing(plan):
    """On Lambda; of the others nothing."""
    words = ("--gpu", "a10", "--hours", "2", "--provider")
    told = "lambda: a node there cannot end its own billing"
    assert told in " ".join(plan(*words, "lambda")[1].split())
    assert "cannot end its own billing" not in " ".join(plan(*FLAGS, "--provider", "runpod")[1].split())
