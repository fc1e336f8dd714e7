"""`gpubroker size` as a person runs it: tables, JSON, own cards, model folders, and bad input."""

import csv
import io
import json
import os

import pytest

from gpubroker.cli import main
from tests.test_hf import HEADER, LLAMA


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit code, out, err), on a machine without GPUs."""
    monkeypatch.setenv("PATH", "/nonexistent")

    def _run(*args):
        code = main(["size", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return _run


def answer(run, *args):
    code, out, _ = run(*args, "--format", "json")
    assert 0 == code
    return json.loads(out)


def shard(header, length=None, data=b""):
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.fixture
def folder(tmp_path):
    """A model in two shards."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(shard(HEADER, data=bytes(2112)))
    return tmp_path


def test_the_table_is_at_most_100_columns_and_ends_with_one_sentence(run):
    """For serving and training, with and without the sources."""
    for args in (
        ("--params", "70b", "--quant", "int4", "--context", "8192"),
        ("--params", "70b", "--quant", "fp16", "--explain"),
        ("--params", "8b", "--train", "full", "--explain"),
        ("--params", "1.3t", "--quant", "q4_k_m", "--batch", "64"),
    ):
        code, out, err = run(*args)
        assert (0, "") == (code, err)
        assert max(map(len, out.splitlines())) <= 100
        assert out.rstrip().endswith(".")


def test_the_lines_add_up(run):
    """As integers, each with its arithmetic and its source."""
    found = answer(run, "--params", "70b", "--quant", "fp16", "--context", 8192)
    assert found["bytes"] == sum(line["bytes"] for line in found["lines"])
    assert all(line["how"] and line["source"] for line in found["lines"])
    assert "does not fit on one 80 GB card" in found["advice"]
    by_name = {(c["gpu"], c["form_factor"]): c for c in found["cards"]}
    assert (2, None) == (by_name["H100", "SXM"]["count"], by_name["RTX3060", "PCIe"]["count"])


def test_csv_has_a_row_a_card(run):
    """With a header."""
    code, out, _ = run("--params", "8b", "--format", "csv", "--gpu", "h100")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (0, ["1", "1", "1"], {"H100"}) == (code, [r["count"] for r in rows], {r["gpu"] for r in rows})


def test_a_declared_card_of_ones_own_is_enough(run, monkeypatch):
    """Said first; not where another card is asked for, and not where it is too small."""
    monkeypatch.setenv("GPUBROKER_LOCAL_GPUS", "rtx4090")
    found = answer(run, "--params", "8b")
    assert ("RTX4090", 1) == (found["own"]["gpu"], found["own"]["count"])
    assert found["advice"].startswith("Your own 1x RTX4090 is enough")
    assert None is answer(run, "--params", "8b", "--gpu", "h100")["own"]
    assert None is answer(run, "--params", "70b", "--quant", "int4")["own"]


def test_own_cards_are_not_asked_for_where_local_is_disabled(run, monkeypatch):
    """As everywhere else."""
    monkeypatch.setenv("GPUBROKER_LOCAL_GPUS", "rtx4090")
    monkeypatch.setenv("GPUBROKER_DISABLED_PROVIDERS", "local")
    assert None is answer(run, "--params", "8b")["own"]


def test_trouble_with_the_own_cards_costs_only_them(run, monkeypatch, tmp_path):
    """A driver that fails is said on standard error."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'a, b'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}:/bin:/usr/bin")
    code, out, err = run("--params", "8b", "--format", "json")
    assert (0, None) == (code, json.loads(out)["own"])
    assert err.startswith("your own GPUs: nvidia-smi")


def test_nothing_that_fits_ends_with_3_and_says_what_would(run):
    """The alternatives were tried."""
    code, out, err = run("--params", "405b", "--quant", "fp16", "--gpu", "4090")
    assert 3 == code
    assert "gpubroker: nothing holds it: " in err
    assert "another card: " in err
    assert "No card that was looked at holds it" in out
    code, _, err = run("--params", "70b", "--train", "full", "--gpu", "h100")
    assert (3, True) == (code, "--train lora" in err)


def test_a_model_folder_is_read_by_its_headers(run, folder):
    """Parameters and bytes of both shards, the shape of the config."""
    found = answer(run, "--config", folder)
    assert (2 * 1056, 32) == (found["model"]["params"], found["model"]["layers"])
    weights = found["lines"][0]
    assert (2 * 2112, "the model's own files") == (weights["bytes"], weights["source"])


def test_each_file_of_a_model_does_alone(run, folder):
    """config.json, one shard, an index; the format can be changed."""
    assert 8_000_000_000 < answer(run, "--config", folder / "config.json")["model"]["params"] < 8_100_000_000
    one = answer(run, "--config", folder / "model-00001-of-00002.safetensors", "--quant", "fp32")
    assert 4 * 1056 == one["lines"][0]["bytes"]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 16_060_522_496}, "weight_map": {}}))
    found = answer(run, "--config", index)
    assert (8_030_261_248, 16_060_522_496) == (found["model"]["params"], found["lines"][0]["bytes"])
    assert "2 bytes each" in found["model"]["source"]


def test_training_whole_takes_16_bits_whatever_is_stored(run, folder):
    """A quantised file is no basis for it."""
    found = answer(run, "--config", folder, "--train", "full")
    assert 2 * 2112 == found["lines"][0]["bytes"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        pytest.param((), "say how large the model is", id="nothing"),
        pytest.param(("--params", "8b", "--config", "x"), "say how large the model is", id="both"),
        *(
            pytest.param(("--params", text), "parameters", id=f"params {text}")
            for text in ("70bb", "NaN", "0", "1e30", "-1b", "")
        ),
        pytest.param(("--params", "8b", "--context", "-5"), "--context", id="negative context"),
        pytest.param(("--params", "8b", "--context", "0"), "--context", id="no context"),
        pytest.param(("--params", "8b", "--batch", "1e3"), "--batch", id="a batch that is none"),
        pytest.param(("--params", "8b", "--quant", "int3"), "--quant", id="unknown format"),
        pytest.param(("--params", "8b", "--gpu", "h900"), "no GPU is called", id="unknown card"),
        pytest.param(
            ("--params", "8b", "--train", "full", "--quant", "int4"), "16-bit", id="4 bits trained whole"
        ),
        pytest.param(("--config", "no-such-model"), "does not exist", id="no file"),
        pytest.param(("--config", "/dev/zero"), "is no file", id="a device"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(run, args, words):
    """No traceback."""
    code, out, err = run(*args)
    assert (2, "") == (code, out)
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        pytest.param("model.safetensors", shard(HEADER, length=2**62), "header would be", id="a huge header length"),
        pytest.param("model.safetensors", b"", "header would be", id="an empty shard"),
        pytest.param("model.safetensors", shard({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "shape", id="a negative shape"),
        pytest.param("config.json", b"{" * 1000, "is not JSON", id="broken JSON"),
        pytest.param("config.json", b" " * 10_000_001, "longer than", id="a config without end"),
        pytest.param("model.safetensors.index.json", b"{}", "weight_map", id="another index"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_one_sentence_and_exit_2(run, tmp_path, name, data, words):
    """By itself and in its folder."""
    path = tmp_path / name
    path.write_bytes(data)
    for given_path in (path, tmp_path):
        code, out, err = run("--config", given_path)
        assert (2, "") == (code, out)
        assert words in err
        assert 1 == len(err.splitlines())


def test_an_empty_folder_is_refused(run, tmp_path):
    """It says what was looked for."""
    code, _, err = run("--config", tmp_path)
    assert (2, True) == (code, "holds no config.json and no safetensors file" in err)
