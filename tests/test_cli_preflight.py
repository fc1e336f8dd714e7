"""`gpubroker preflight` on the machine of the tests, with the test cloud's driver in front of it or without."""

import json
import os
import socket
from dataclasses import replace

import pytest

from gpubroker.cli import main
from tests.test_testcloud_nodes import H100

nodes_home = pytest.importorskip("gpubroker.testcloud.nodes_home", reason="needs the extra [testcloud]")


def fake_gpu(folder, truth):
    """A folder for the front of LD_LIBRARY_PATH, with bin for the front of PATH: this machine then has these GPUs."""
    import asyncio

    fakes = asyncio.run(nodes_home.build_fakes(folder / "fakes"))
    nodes_home.furnish(folder / "home", truth, (), fakes)
    return folder / "home" / ".testcloud"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run it on a machine with these GPUs; None = as it is, without any tool on its path."""

    def _run(truth, *words):
        if truth is None:
            monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
        else:
            own = fake_gpu(tmp_path, truth)
            monkeypatch.setenv("PATH", f"{own}/bin:{os.environ['PATH']}")
            monkeypatch.setenv("LD_LIBRARY_PATH", str(own))
        with socket.create_server(("127.0.0.1", 0)) as outside:
            monkeypatch.setenv("GPUBROKER_REACH", f"127.0.0.1:{outside.getsockname()[1]}")
            code = main(["preflight", "--folder", str(tmp_path), *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return _run


def test_a_machine_without_gpus_is_not_trusted(run):
    """Exit 3, and why."""
    code, out, _ = run(None)
    assert 3 == code
    assert "There is no NVIDIA GPU here that answers: nvidia-smi is not installed." in out
    assert "no-gpu: nvidia-smi is not installed" in out
    assert "No job should run here." in out


def test_an_honest_machine_is_trusted(run):
    """As JSON: verdict and facts."""
    code, out, _ = run(replace(H100, gpu_count=1), "--format", "json")
    answer = json.loads(out)
    assert (0, True, []) == (code, answer["trusted"], answer["reasons"])
    assert 1 == len(answer["facts"]["gpus"])


def test_less_than_what_was_asked_for_is_named(run):
    """Two cards wanted, one there."""
    code, out, _ = run(replace(H100, gpu_count=1), "--gpu", "h100-sxm", "--count", "2")
    assert 3 == code
    assert "fewer-gpus: 1 of 2 GPUs are there" in out


def test_a_machine_without_gpus_says_so_as_json(run):
    """The reason has its code, and standard output is JSON alone."""
    code, out, _ = run(None, "--format", "json")
    answer = json.loads(out)
    assert (3, False) == (code, answer["trusted"])
    assert {"code": "no-gpu", "text": "nvidia-smi is not installed", "measured": None, "wanted": None} == (
        answer["reasons"][0]
    )


def test_a_store_is_tried_as_a_job_would(run, tmp_path):
    """A folder here; nothing is left of it. One that cannot be written is the store's fault: exit 2."""
    code, out, _ = run(replace(H100, gpu_count=1), "--store", str(tmp_path / "saves"), "--format", "json")
    assert (0, True) == (code, json.loads(out)["facts"]["store"]["write_mb_s"] > 0)
    assert [] == [path for path in (tmp_path / "saves").rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("")
    code, out, _ = run(replace(H100, gpu_count=1), "--store", str(tmp_path / "file"))
    assert 2 == code
    assert "once its store is in order" in out


def test_a_bucket_without_keys_of_its_own_is_exit_2(run):
    """The account's own key would never go onto a node, so it proves nothing."""
    code, _, err = run(replace(H100, gpu_count=1), "--store", "s3://bucket/jobs")
    assert 2 == code
    assert "GPUBROKER_STORE_ACCESS_KEY_ID is not set" in err
