"""`gpubroker calibrate` as a person runs it: record, list, remove, and bad input."""

import csv
import io
import json

import pytest

from gpubroker.cli import main


@pytest.fixture
def run(capsys):
    """(exit code, out, err)."""

    def _run(*args):
        code = main(["calibrate", *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return _run


ONE = ("--job", "sft-8b", "--gpu", "h100-sxm", "--steps", "1200", "--seconds", "600")
FOUR = ("--job", "sft-8b", "--gpu", "4090", "--count", "4", "--steps", "900", "--seconds", "611.5")


def test_a_run_is_recorded_listed_and_removed(run):
    """With its speed."""
    assert (0, "1: sft-8b: 2 steps/s on 1x H100 SXM\n", "") == run(*ONE)
    assert (0, "2: sft-8b: 1.472 steps/s on 4x RTX4090 PCIe\n", "") == run(*FOUR)
    code, out, _ = run("ls", "--format", "json")
    rows = json.loads(out)["measurements"]
    assert (0, [2, 1], ["611.500", "600.000"]) == (
        code,
        [r["id"] for r in rows],
        [r["seconds"] for r in rows],
    )
    code, out, _ = run("ls")
    assert ("4x RTX4090 PCIe" in out, max(map(len, out.splitlines())) <= 100) == (True, True)
    code, out, _ = run("ls", "--job", "sft-8b", "--format", "csv")
    assert ["H100", "RTX4090"] == sorted(r["gpu"] for r in csv.DictReader(io.StringIO(out)))
    assert (0, "1 removed\n", "") == run("rm", "1", "1")


def test_an_empty_list_says_how_to_fill_it(run):
    """On standard error; JSON is an empty list."""
    code, out, err = run("ls")
    assert (0, "", True) == (code, out, "gpubroker calibrate --help" in err)
    assert {"measurements": []} == json.loads(run("ls", "--format", "json")[1])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        pytest.param((), "needs --job, --gpu, --steps, --seconds", id="nothing"),
        pytest.param(ONE[:-2], "needs --seconds", id="no seconds"),
        pytest.param((*ONE, "--gpu", "h100"), "say which", id="a card of several forms"),
        pytest.param((*ONE, "--gpu", "h900"), "no GPU is called", id="an unknown card"),
        pytest.param((*ONE, "--steps", "0"), "--steps", id="no steps"),
        pytest.param((*ONE, "--steps", "1.5"), "--steps", id="half a step"),
        pytest.param((*ONE, "--seconds", "NaN"), "--seconds", id="NaN"),
        pytest.param((*ONE, "--seconds", "-1"), "--seconds", id="negative"),
        pytest.param((*ONE, "--seconds", "0.0001"), "below a millisecond", id="too short"),
        pytest.param((*ONE, "--seconds", "1e30"), "--seconds", id="too long"),
        pytest.param((*ONE, "--count", "0"), "--count", id="no card"),
        pytest.param((*ONE, "--job", " "), "printable", id="no name"),
        pytest.param((*ONE, "--job", "a\x1b[31m"), "printable", id="a name that paints"),
        pytest.param((*ONE, "--job", "x" * 101), "printable", id="an endless name"),
        pytest.param(("--job", "x", "ls"), "after its name", id="an option before ls"),
        pytest.param(("rm",), "IDS", id="nothing to remove"),
        pytest.param(("rm", "0"), "IDS", id="an id that is none"),
        pytest.param(("rm", str(10**30)), "IDS", id="an endless id"),
        pytest.param(("rm", "7"), "no measurement has the id 7", id="an id that is not there"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(run, args, words):
    """And nothing is recorded."""
    code, out, err = run(*args)
    assert (2, "") == (code, out)
    assert words in err
    assert {"measurements": []} == json.loads(run("ls", "--format", "json")[1])
