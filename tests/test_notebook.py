"""examples/market.ipynb: its cells run as they are, on public histories and on one's own polls."""

import json
from pathlib import Path

import pytest

from tests.support import SHARED
from tests.test_cli_history import ask, twenty_days  # noqa: F401

NOTEBOOK = Path(__file__).parents[1] / "examples" / "market.ipynb"
HISTORY = SHARED / "prices" / "history_public"
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def run(monkeypatch):
    """`run(folder of histories)` -> the names that the cells made, and the figures that they drew."""
    # The notebook sets it for the rest of its kernel's life.
    monkeypatch.setenv("GPUBROKER_DB_URL", "")
    monkeypatch.delenv("GPUBROKER_DB_URL")
    plt.switch_backend("agg")
    plt.close("all")

    def _run(public):
        monkeypatch.setenv("MARKET_HISTORY", str(public))
        names = {}
        for cell in json.loads(NOTEBOOK.read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)  # noqa: S102  they are ours
        figures = [plt.figure(number) for number in plt.get_fignums()]
        for figure in figures:
            figure.canvas.draw()
        return names, figures

    yield _run
    plt.close("all")


@pytest.mark.skipif(not HISTORY.is_dir(), reason="the public histories of ../shared are not here")
def test_the_notebook_draws_the_market_from_public_histories(run):
    """Four pictures, each with lines, a title and units; every GPU that it names has a price."""
    names, figures = run(HISTORY)
    assert 4 == len(figures)
    for figure in figures:
        (axes,) = figure.axes
        assert axes.get_title(loc="left")
        assert "$ for one GPU-hour" in (axes.get_ylabel(), axes.get_xlabel())
        assert axes.lines
    assert set(names["GPUS"]) == {gpu for gpu, frame in names["frames"].items() if len(frame) > 20}
    assert len(names["spot"]["region"].unique()) > 3


def test_the_notebook_draws_ones_own_polls(run, ask, monkeypatch, tmp_path):  # noqa: F811
    """Where no public history lies beside the repository."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")
    names, figures = run(tmp_path)
    assert 4 == len(figures)
    assert {"h100"} == {gpu for gpu, frame in names["frames"].items() if len(frame)}
    assert {"lambda", "vast"} == set(names["cheapest"])


def test_the_notebook_is_kept_with_its_pictures():
    """As whoever reads it on the web sees it: executed, and without anything of the machine that did."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    pictures = [out for cell in cells for out in cell.get("outputs", ()) if "image/png" in out["data"]]
    assert 4 == len(pictures)
    assert {"display_data"} == {out["output_type"] for cell in cells for out in cell.get("outputs", ())}
