"""`gpubroker volume`, and jobs that keep their checkpoints on one, over the vendors' APIs on loopback."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import modal
import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker import config
from gpubroker.cli import main
from gpubroker.doors import SystemClock
from gpubroker.prices.market import open_context
from gpubroker.run.records import Records
from gpubroker.testcloud.client import running
from tests.support import first_of
from tests.test_cli_run import TRAIN, ended, heard

# Where each vendor's volume is made, and how it is asked for.
MADE = {
    "runpod": ("--region", "EU-RO-1", "--size", "100GB"),
    "lambda": ("--region", "us-east-1"),
    "modal": (),
}


@pytest.fixture(scope="module")
def whole_cloud():
    """One for the module: each test deletes what it made."""
    with running(speed=60) as cloud:
        modal.Client._set_env_client(None)  # the SDK keeps one connection a process
        yield cloud
        modal.Client._set_env_client(None)


@pytest.fixture
def cloud(whole_cloud, monkeypatch, tmp_path):
    """The environment of a user whose vendors are all on loopback and have no volumes yet."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MODAL_", "GPUBROKER_"))]:
        monkeypatch.delenv(name)
    for name, value in whole_cloud.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/prices.db")
    monkeypatch.setenv("GPUBROKER_DISABLED_PROVIDERS", "aws,local")
    yield whole_cloud
    whole_cloud.mend()
    main(["sweep", "--volumes", "--end", "--yes"])


def run(capsys, *words):
    code = main([*words, "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    code = main(list(words))
    out, err = capsys.readouterr()
    assert "" == out
    return code, err.strip().splitlines()[-1]


def create(capsys, provider, name="data"):
    code, made = run(capsys, "volume", "create", name, "--provider", provider, *MADE[provider], "--yes")
    assert 0 == code
    return made


def listed(capsys):
    code, found = run(capsys, "volume", "ls")
    assert (0, []) == (code, found["problems"])
    return [(v["provider"], v["volume"], v["region"], v["usd_per_month"]) for v in found["volumes"]]


def files_of(home):
    """What lies in a node's job folders now: names and contents. The agent's own come and go."""
    found = {}
    for path in Path(home, "gpubroker").rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            found[path.name] = path.read_bytes()
    return found


def test_a_volume_is_made_listed_with_its_monthly_cost_and_deleted(cloud, capsys):
    """At each vendor that has them; what grows costs what lies in it, where the vendor says how much."""
    for provider in MADE:
        create(capsys, provider)
    assert [
        ("lambda", "data", "us-east-1", "0.000000"),
        ("modal", "data", "", None),
        ("runpod", "data", "EU-RO-1", "7.000000"),
    ] == listed(capsys)
    for provider in MADE:
        assert 0 == main(["volume", "rm", "data", "--provider", provider, "--yes"])
    capsys.readouterr()
    assert [] == listed(capsys)


def test_a_create_says_its_price_and_who_says_so_before_it_asks(cloud, capsys, monkeypatch):
    """Whoever says no pays nothing."""
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: "n")
    words = ("volume", "create", "data", "--provider", "runpod", *MADE["runpod"])
    assert 130 == main(list(words))
    err = capsys.readouterr().err
    assert "100 GB cost $7.00 a month until it is deleted (official, 2026-08-20: " in err
    assert [] == listed(capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("runpod", "--size", "100GB"), "--region is missing", id="no data centre"),
        pytest.param(("runpod", "--region", "EU-RO-1"), "--size is missing", id="no size"),
        pytest.param(("runpod", "--region", "EU-RO-1", "--size", "5GB"), "has 10 to 4096 GB", id="too small"),
        pytest.param(("lambda", "--region", "us-east-1", "--size", "9GB"), "leave --size out", id="it grows"),
        pytest.param(("modal", "--region", "us"), "leave --region out", id="no regions"),
        pytest.param(("vast",), "keep checkpoints in a bucket", id="a vendor without volumes"),
        pytest.param(("aws",), "disabled in your config", id="disabled"),
        pytest.param(("acme",), "no provider is called 'acme'", id="nobody"),
    ],
)
def test_a_create_that_cannot_be_is_one_sentence_and_exit_2(cloud, capsys, words, sentence):
    """Before anything is asked of the vendor."""
    code, said = refused(capsys, "volume", "create", "data", "--yes", "--provider", *words)
    assert 2 == code
    assert sentence in said


def test_a_region_that_the_vendor_does_not_have_is_told_in_its_words(cloud, capsys):
    """Exit 4: the vendor refused."""
    words = ("--provider", "runpod", "--region", "XX-1", "--size", "10GB", "--yes")
    code, said = refused(capsys, "volume", "create", "data", *words)
    assert 4 == code
    assert "dataCenter" in said


def test_a_name_is_taken_once_at_a_vendor_and_found_at_the_one_that_has_it(cloud, capsys):
    """At two vendors it must be said which."""
    create(capsys, "runpod")
    code, said = refused(capsys, "volume", "create", "data", "--provider", "runpod", *MADE["runpod"])
    assert (2, "gpubroker: runpod has a volume data already, in EU-RO-1") == (code, said)
    create(capsys, "modal")
    code, said = refused(capsys, "volume", "rm", "data")
    assert 2 == code
    assert "a volume data is at modal and runpod in EU-RO-1: say which with --provider" in said
    assert 2 == refused(capsys, "volume", "create", "Data", "--provider", "modal")[0]


@pytest.mark.parametrize("kind", ["5xx_after", "drop_after"])
def test_a_create_without_an_answer_is_looked_for_and_made_once(cloud, capsys, kind):
    """RunPod takes the same name twice, and would bill both."""
    cloud.break_with({"endpoint": "runpod POST /v2/network-volumes", "kind": kind})
    create(capsys, "runpod")
    assert [("runpod", "data", "EU-RO-1", "7.000000")] == listed(capsys)


def test_a_vendor_that_does_not_answer_is_told_with_exit_4(cloud, capsys, monkeypatch):
    """The others are listed all the same."""
    create(capsys, "modal")
    monkeypatch.setenv("GPUBROKER_RUNPOD_URL", "http://127.0.0.1:9")
    code, found = run(capsys, "volume", "ls")
    assert (4, ["data"]) == (code, [v["volume"] for v in found["volumes"]])
    assert ["runpod"] == [problem["provider"] for problem in found["problems"]]


def test_sweep_leaves_the_volumes_of_unfinished_jobs_and_deletes_only_when_told(cloud, capsys, monkeypatch):
    """Data is never deleted without being named."""
    create(capsys, "runpod")
    create(capsys, "modal", "old")
    with open_context(config.load(), os.environ, SystemClock()) as (store, _):
        records = Records(store.database, SystemClock())
        job = records.add_job("job", json.dumps({"checkpoint": {"store": "volume:data"}}))
    code, found = run(capsys, "sweep", "--volumes")
    assert (0, [("old", False)]) == (code, [(v["volume"], v["deleted"]) for v in found["volumes"]])
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: "n")
    assert 130 == main(["sweep", "--volumes", "--end"])
    capsys.readouterr()
    assert ["old", "data"] == [name for _, name, _, _ in listed(capsys)]
    code, found = run(capsys, "sweep", "--volumes", "--end", "--yes")
    assert (0, [("old", True)]) == (code, [(v["volume"], v["deleted"]) for v in found["volumes"]])
    records.end_job(job, "done")
    code, found = run(capsys, "sweep", "--volumes", "--end", "--yes")
    assert (0, [("data", True)]) == (code, [(v["volume"], v["deleted"]) for v in found["volumes"]])


def test_a_dry_run_shows_offers_where_the_volume_is_and_why_others_are_left_out(cloud, capsys):
    """One data centre, and the cloud that mounts volumes."""
    create(capsys, "runpod")
    words = ["run", "--gpu", "h100", "--hours", "1", "--store", "volume:data", "--dry-run", "--", "true"]
    assert 0 == main(words)
    out, err = capsys.readouterr()
    rows = out.splitlines()[1:]
    assert rows
    assert all("runpod" in row and "in EU-RO-1" in row for row in rows)
    assert "volume data is at runpod in EU-RO-1: only offers there are tried" in err
    assert "offers left out: the community cloud mounts no volumes" in err


def test_a_volume_where_no_card_is_for_rent_is_exit_3_and_says_why(cloud, capsys):
    """Not a wait without an end."""
    words = ["--provider", "runpod", "--region", "AP-JP-1", "--size", "10GB", "--yes"]
    assert 0 == main(["volume", "create", "data", *words])
    words = ["run", "--gpu", "h100", "--hours", "1", "--store", "volume:data", "--dry-run", "--", "true"]
    code, said = refused(capsys, *words)
    assert 3 == code
    assert "another region: volume data is in AP-JP-1" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("volume:none",), "no volume is called none at ", id="no such volume"),
        pytest.param(("volume:",), "names no volume: write volume:data", id="no name"),
        pytest.param(("volume:data", "--provider", "vast"), "no network volumes there", id="vast has none"),
    ],
)
def test_a_store_that_is_no_volume_is_one_sentence_and_exit_2(cloud, capsys, words, sentence):
    """Before anything is rented."""
    code, said = refused(capsys, "run", "--gpu", "h100", "--hours", "1", "--store", *words, "--", "true")
    assert 2 == code
    assert sentence in said


@pytest.mark.parametrize(
    ("provider", "gpu"), first_of(("runpod", "4090"), ("lambda", "a10"), ("modal", "l4"))
)
def test_a_preempted_job_goes_on_from_its_volume_and_no_key_is_on_its_nodes(tmp_path, provider, gpu):
    """The second node has the first one's checkpoints; while a node mounts it, the volume is not deleted."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    with running(speed=10) as cloud:
        homes = {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("DATA", "CACHE", "CONFIG")}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        env = {**kept, **cloud.env, **homes, "GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/p.db"}

        def gpubroker(*words):
            command = [sys.executable, "-m", "gpubroker", *words]
            return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)

        made = gpubroker("volume", "create", "data", "--provider", provider, *MADE[provider], "--yes")
        assert 0 == made.returncode, made.stderr
        command = [
            sys.executable, "-m", "gpubroker", "run", "--gpu", gpu, "--hours", "1", "--max-usd", "5",
            "--store", "volume:data", "--artifact", "out", "--out", str(tmp_path / "back"),
            "--format", "json", "--", "python3", "train.py",
        ]  # fmt: skip
        with subprocess.Popen(
            command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            heard(process, "step 12")
            (node,) = [node for node in cloud.nodes() if node["state"] == "running"]
            files = files_of(node["home"])
            kept_from = gpubroker("volume", "rm", "data", "--yes")
            cloud.preempt(node["id"])
            lines = heard(process, "attempt ")
            code, record, _ = ended(process)
        left = {node["state"] for node in cloud.nodes()}
        shown = json.loads(gpubroker("volume", "ls", "--format", "json").stdout)["volumes"]
        gone = gpubroker("volume", "rm", "data", "--yes")
    assert int(lines[-1].split()[-1]) >= 10
    assert (0, "done", {"ended"}) == (code, record["state"], left)
    assert {provider} == {attempt["provider"] for attempt in record["attempts"]}
    places = {made["where"].rpartition("/")[0] for made in record["checkpoints"]}
    epochs = {made["epoch"] for made in record["checkpoints"]}
    assert {f"volume:data/{record['id']}/{epoch:08d}" for epoch in epochs} == places
    assert 2 == len(epochs)
    assert str(sum(range(31))) == (tmp_path / "back" / "out" / "result.txt").read_text()
    assert {"config.json", "train.py"} <= set(files)
    assert "store.json" not in files
    secrets = [value.encode() for name, value in cloud.env.items() if "KEY" in name or "SECRET" in name]
    assert [] == [name for name, data in files.items() if any(secret in data for secret in secrets)]
    assert 2 == kept_from.returncode
    assert f"volume data is in use by {record['id']}" in kept_from.stderr
    assert [("data", [])] == [(v["volume"], v["jobs"]) for v in shown]
    assert 0 == gone.returncode, gone.stderr
