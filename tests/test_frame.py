"""`gpubroker.history`: the same figures as the command's, as a tidy frame."""

import csv
import io
import math

import pytest

import gpubroker
from gpubroker.errors import BrokerError
from tests.test_cli_history import ask, twenty_days  # noqa: F401

pd = pytest.importorskip("pandas")


def test_a_frame_is_what_the_command_prints(ask):  # noqa: F811
    """Its columns say their units; times are UTC."""
    words = ("--gpu", "h100", "--stat", "p50", "--stat", "available", "--stat", "n", "--since", "9d")
    rows = list(csv.DictReader(io.StringIO(ask("history", *words, "--format", "csv")[1])))
    frame = gpubroker.history("h100", stats=("p50", "available", "n"), since="9d")
    assert list(rows[0]) == list(frame.columns)
    assert [row["begin"] for row in rows] == [at.strftime("%Y-%m-%dT%H:%M:%SZ") for at in frame["begin"]]
    for name in ("p50_usd_per_gpu_hour", "available_share", "observations"):
        expected = [float(row[name]) if row[name] else math.nan for row in rows]
        assert pytest.approx(expected, nan_ok=True) == list(frame[name])
    assert ("UTC", "float64", "int64") == (
        str(frame["begin"].dt.tz),
        str(frame["p50_usd_per_gpu_hour"].dtype),
        str(frame["observations"].dtype),
    )


def test_what_is_asked_narrows_it_as_on_the_command_line(ask):  # noqa: F811
    """One name or several; by what it is grouped."""
    frame = gpubroker.history("h100", market="on-demand", by="gpu_count", resample="7d", stats="max")
    assert ["begin", "gpu_count", "max_usd_per_gpu_hour"] == list(frame.columns)
    assert {8} == set(frame["gpu_count"])
    assert {3.0} == set(frame["max_usd_per_gpu_hour"])
    together = gpubroker.history("h100", by=(), stats="min", since="9d")
    assert ["begin", "min_usd_per_gpu_hour"] == list(together.columns)
    assert together["begin"].is_unique
    assert 0 == len(gpubroker.history(["h100"], provider=["nobody"]))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        pytest.param({"gpu": "h10000"}, "h10000", id="no card"),
        pytest.param({"gpu": "h100", "market": "black"}, "'black' is not one of spot", id="no market"),
        pytest.param({"gpu": "h100", "stats": "p51"}, "stats: 'p51' is not one of min", id="no figure"),
        pytest.param({"gpu": "h100", "by": ("zone",)}, "by: 'zone' is not one of", id="no dimension"),
        pytest.param({"gpu": "h100", "resample": "soon"}, "resample: 'soon'", id="no time"),
        pytest.param({"gpu": "h100"}, "there is no price yet", id="no polls"),
    ],
)
def test_what_is_not_understood_is_one_sentence(asked, sentence):
    """As an error that names it."""
    with pytest.raises(BrokerError) as caught:
        gpubroker.history(**asked)
    assert sentence in str(caught.value)


def test_nothing_else_hides_in_the_package():
    """A name that is not there says so."""
    with pytest.raises(AttributeError, match="has no attribute 'histry'"):
        gpubroker.histry  # noqa: B018


def test_without_pandas_the_sentence_says_how_to_get_it(monkeypatch):
    """It is an extra."""
    monkeypatch.setattr("gpubroker.prices.frame.find_spec", lambda name: None)
    with pytest.raises(BrokerError, match=r"pip install 'gpubroker\[pandas\]'"):
        gpubroker.history("h100")
