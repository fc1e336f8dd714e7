"""`gpubroker run` over the vendors' APIs on loopback, with real processes behind real SSH as nodes."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker.cli import main
from gpubroker.testcloud.client import running
from tests.support import first_of

TRAIN = """
import json, os, time
WAIT_AT = 0
folder = os.environ["GPUBROKER_CHECKPOINT_DIR"]
start = 0
if os.environ.get("GPUBROKER_RESUME_FROM"):
    start = json.load(open(os.environ["GPUBROKER_RESUME_FROM"] + "/state.json"))["step"]
print("attempt", os.environ["GPUBROKER_ATTEMPT"], "from", start, flush=True)
total = start * (start + 1) // 2
for step in range(start + 1, 31):
    time.sleep(0.3)
    while step == 20 and start < 10:  # it is to be preempted, however busy the machine
        time.sleep(0.1)
    total += step
    part = f"{folder}/step-{step}.tmp"
    os.makedirs(part)
    json.dump({"step": step}, open(part + "/state.json", "w"))
    open(part + "/.complete", "w")
    os.rename(part, f"{folder}/step-{step}")
    print("step", step, flush=True)
    while step == WAIT_AT and os.environ["GPUBROKER_ATTEMPT"] == "1":
        time.sleep(0.1)
os.makedirs("out")
open("out/plan.json", "w").write(open(os.environ["GPUBROKER_PLAN_FILE"]).read())
open("out/result.txt", "w").write(str(total))
"""


def client(cloud):
    """Of the test cloud's S3."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=cloud.env["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id=cloud.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=cloud.env["AWS_SECRET_ACCESS_KEY"],
    )


@contextmanager
def bucket(cloud):
    """A bucket of the test cloud's AWS for checkpoints, as the environment that names it."""
    client(cloud).create_bucket(Bucket="jobs")
    keys = {name: cloud.env[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    yield {
        **{f"GPUBROKER_STORE_{name}": value for name, value in keys.items()},
        "GPUBROKER_STORE_URL": cloud.env["AWS_ENDPOINT_URL"],
    }


@pytest.fixture
def job(tmp_path):
    """A folder with a job, the environment of its user, and the command line."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    begun = []

    def _job(cloud, *words, command=(), **more):
        homes = {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("DATA", "CACHE", "CONFIG")}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        env = {**kept, **cloud.env, **homes, "GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/p.db", **more}
        command = command or [
            sys.executable, "-m", "gpubroker", "run", "--gpu", "4090", "--hours", "1", "--max-usd", "5",
            "--folder", str(folder), "--artifact", "out", "--out", str(tmp_path / "back"), "--format", "json",
            *words, "--", "python3", "train.py",
        ]  # fmt: skip
        begun.append(
            subprocess.Popen(
                command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return begun[-1]

    yield _job
    for process in begun:
        with process:
            process.kill()


def heard(process, text):
    """Read what it says until a line begins so; the lines."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(text):
            return lines
    raise AssertionError(f"{text!r} was never said: {lines[-20:]}")


def taken_at_step_12(process, cloud):
    """What is said until a node that came so far is taken, here or by the market, and the next one goes on.

    The last line is the next one's first.
    """
    lines = []
    for line in process.stderr:
        lines.append(line)
        word, *rest = line.split()
        if word == "attempt" and int(rest[-1]) >= 10:
            return lines
        if word == "step" and int(rest[0]) == 12:
            for node in cloud.nodes(state="running"):
                cloud.preempt(node["id"])
    raise AssertionError(f"nothing went on from step 10: {lines[-20:]}")


def ended(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, json.loads(out), err


def test_a_preempted_job_goes_on_from_its_checkpoint_and_its_artifacts_come_back(job, tmp_path):
    """A vast bid is lost at step 12 or later, by hand and perhaps by the market again; the next begins there."""
    with running(speed=10) as cloud, bucket(cloud) as store:
        process = job(cloud, "--provider", "vast", "--market", "spot", "--store", "s3://jobs/sft", **store)
        taken_at_step_12(process, cloud)
        code, record, _ = ended(process)
        left = [node["state"] for node in cloud.nodes()]
    assert (0, "done", {"ended"}) == (code, record["state"], set(left))
    *lost_by, last = [a["end_reason"].partition(":")[0] for a in record["attempts"]]
    assert ({"preempted"}, "done") == (set(lost_by), last)
    epochs = [made["epoch"] for made in record["checkpoints"]]
    assert len(set(epochs)) >= 2
    assert sorted(epochs) == epochs
    assert record["checkpoints"][-1]["step"] == 30
    places = [made["where"].rpartition("/")[0] for made in record["checkpoints"]]
    assert [f"s3://jobs/sft/{record['id']}/{epoch:08d}" for epoch in epochs] == places
    assert record["checkpoints"][0]["bytes"] > 0
    lost = [a["work_lost_s"] for a in record["attempts"]]
    assert (True, 0, sum(lost)) == (all(0 <= s < 30 for s in lost), lost[-1], record["work_lost_s"])
    shown = job(
        cloud, command=[sys.executable, "-m", "gpubroker", "job", "show", record["id"], "--format", "json"]
    )
    assert (0, record) == ended(shown)[:2]
    assert str(sum(range(31))) == (tmp_path / "back" / "out" / "result.txt").read_text()
    plan = json.loads((tmp_path / "back" / "out" / "plan.json").read_text())
    assert (True, 900.0, False) == (plan["hazard_per_hour"] > 0, plan["longest_s"], "interval_s" in plan)


def test_a_damaged_checkpoint_is_passed_over_and_the_person_is_told(job, tmp_path):
    """A bit of the newest flips in the bucket: the next node goes on from the one before, and says why."""
    with running(speed=10) as cloud, bucket(cloud) as store:
        (tmp_path / "job" / "train.py").write_text(TRAIN.replace("WAIT_AT = 0", "WAIT_AT = 12"))
        process = job(cloud, "--provider", "runpod", "--store", "s3://jobs/sft", **store)
        heard(process, "step 12")
        s3 = client(cloud)
        key = newest(s3, step=12)
        data = bytearray(s3.get_object(Bucket="jobs", Key=key)["Body"].read())
        data[3] ^= 1
        s3.put_object(Bucket="jobs", Key=key, Body=bytes(data))
        (node,) = [node for node in cloud.nodes() if node["state"] == "running"]
        cloud.preempt(node["id"])
        code, record, said = ended(process)
    assert (0, "done") == (code, record["state"])
    (passed,) = record["passed_over"]
    reason = "state.json has other content than was published (SHA-256)"
    assert (2, reason) == (passed["epoch"], passed["reason"])
    assert f"s3://jobs/{key.rpartition('-step-12')[0]}" == passed["where"]
    assert 1 == said.count(f"checkpoint {passed['where']} is passed over: {reason}")
    assert "attempt 2 from 11" in said
    assert str(sum(range(31))) == (tmp_path / "back" / "out" / "result.txt").read_text()


def newest(s3, step):
    """The key of the step's only file, once it is published."""
    while True:
        keys = [row["Key"] for row in s3.list_objects_v2(Bucket="jobs").get("Contents", [])]
        numbers = [key.split("/")[-2].partition("-")[0] for key in keys if f"-step-{step}." in key]
        if numbers and any(key.endswith(f"{numbers[0]}.manifest.json") for key in keys):
            return next(key for key in keys if key.endswith("/state.json") and f"-step-{step}." in key)
        time.sleep(0.1)


def test_a_job_that_fails_is_exit_6_and_leaves_nothing_that_bills(job, tmp_path):
    """Its log comes back all the same."""
    with running(speed=10) as cloud:
        (tmp_path / "job" / "train.py").write_text("print('hello'); raise SystemExit(3)")
        code, record, _ = ended(job(cloud, "--provider", "runpod"))
        left = [node["state"] for node in cloud.nodes()]
    assert (6, "failed", ["ended"]) == (code, record["state"], left)
    assert "hello" in (tmp_path / "back" / "job.log").read_text()


@pytest.mark.parametrize("script", first_of("gpu2vast", "gpu2runpod"))
def test_a_script_of_one_line_goes_on_after_an_interruption_and_brings_the_files_back(job, tmp_path, script):
    """RunPod has no spot: the loss of a host is its interruption."""
    script = str(Path(__file__).parents[1] / "scripts" / script)
    with running(speed=10) as cloud, bucket(cloud) as store:
        process = job(
            cloud, command=[sys.executable, script, "--store", "s3://jobs/x", "train.py"], **store
        )  # fmt: skip
        said = []
        with process:
            for line in process.stdout:
                said.append(line)
                if line.startswith("step 12"):
                    for node in cloud.nodes(state="running"):
                        cloud.preempt(node["id"])
        assert 0 == process.returncode
    begun = [line.split() for line in said if line.startswith("attempt")]
    assert "0" == begun[0][3]
    assert int(begun[-1][3]) >= 10
    (back,) = (tmp_path / "job" / "gpubroker-out").glob("job-*/out/result.txt")
    assert str(sum(range(31))) == back.read_text()


def test_a_job_goes_on_at_another_vendor_that_reaches_its_store(job, tmp_path):
    """vast.ai wants to be left alone when its node is lost; the next one is RunPod's, from the same checkpoint."""
    refusal = {"endpoint": "vast PUT /api/v0/asks/*", "kind": "429", "retry_after_s": 3600}
    with running(speed=10) as cloud, bucket(cloud) as store:
        cloud.break_with({**refusal, "skip": 1, "count": -1})
        process = job(cloud, "--provider", "vast", "--provider", "runpod", "--store", "s3://jobs/x", **store)
        taken_at_step_12(process, cloud)
        code, record, _ = ended(process)
    assert (0, "done") == (code, record["state"])
    assert ("vast", "runpod") == (record["attempts"][0]["provider"], record["attempts"][-1]["provider"])
    assert str(sum(range(31))) == (tmp_path / "back" / "out" / "result.txt").read_text()


def test_a_running_job_is_talked_to_by_its_id(job, tmp_path):
    """As a box is: a command on its node, here one that ends the wait."""
    (tmp_path / "job" / "train.py").write_text(
        "import os, time\nprint('waits', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.1)\n"
    )
    with running(speed=10) as cloud:
        process = job(cloud, "--provider", "runpod")
        lines = heard(process, "waits")
        name = next(line.partition(":")[0] for line in lines if line.startswith("job-"))
        touch = f"touch ~/gpubroker/{name}/work/go"
        reached = job(
            cloud, command=[sys.executable, "-m", "gpubroker", "exec", name, "--", "sh", "-c", touch]
        )
        _, errors = reached.communicate(timeout=60)
        code, record, _ = ended(process)
    assert (0, "") == (reached.returncode, errors)
    assert (0, "done") == (code, record["state"])


def test_a_job_that_nobody_knows_is_exit_2(capsys, monkeypatch, tmp_path):
    """One sentence, no traceback."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")
    assert 2 == main(["job", "show", "job-1"])
    assert "no job is called 'job-1'" in capsys.readouterr().err


def test_a_preset_is_shown_as_the_command_that_it_comes_to(job):
    """With the server's further options, and with what may bill on where it would be rented."""
    with running(speed=10) as cloud:
        process = job(
            cloud,
            command=[
                sys.executable, "-m", "gpubroker", "run", "--provider", "lambda", "--min-vram", "24",
                "--hours", "2", "--preset", "vllm", "--model", "org/model", "--dry-run",
                "--", "--max-model-len", "8192",
            ],
        )  # fmt: skip
        _, said = process.communicate(timeout=60)
    assert 0 == process.returncode, said
    assert (
        "would run in vllm/vllm-openai:latest: vllm serve org/model --host 127.0.0.1 --port 8000"
        " --tensor-parallel-size 1 --max-model-len 8192\n"
    ) in said
    assert "lambda: a node there cannot end its own billing" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(["--preset", "vllm"], "say which with --model", id="no model"),
        pytest.param(["--model", "org/model"], "go with --preset", id="no preset"),
        pytest.param(["--preset", "vllm", "--model", "-x"], "is no name of a model", id="no name"),
    ],
)
def test_half_a_preset_is_exit_2(capsys, monkeypatch, tmp_path, words, sentence):
    """One sentence."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")
    assert 2 == main(["run", "--gpu", "4090", "--hours", "1", *words])
    assert sentence in capsys.readouterr().err


def test_a_run_that_says_too_little_is_exit_2(capsys):
    """What to run, and how much work it is."""
    assert 2 == main(["run"])
    assert "say what to run" in capsys.readouterr().err
    assert 2 == main(["run", "--gpu", "4090", "--", "true"])
    assert "say how much work" in capsys.readouterr().err
