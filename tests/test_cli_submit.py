"""`gpubroker submit` and `job resume`: what is checked, what is kept, and who is told to run it."""

import subprocess
import sys

import pytest

from gpubroker.jobspec import kept_job
from gpubroker.run import kept

WORDS = ("submit", "--gpu", "4090", "--hours", "2")
KEYS = ("URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
JOB = """
name = "sft"
command = "python3 train.py"
secrets = ["HF_TOKEN"]
[gpu]
name = "4090"
[work]
hours = 2
[limits]
budget_usd = 9
"""


def test_a_job_file_is_kept_as_it_was_and_waits_for_a_supervisor(user, records, monkeypatch):
    """Its id on standard output; who could run it is said; nothing secret is in the database."""
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    (user.work / "job.toml").write_text(JOB)
    code, out, said = user.do("submit", "job.toml")
    job_id = out.strip()
    (user.work / "train.py").write_text("print('second')\n")
    row, found = records.row(job_id), kept.load(user.jobs_dir / job_id)
    assert (0, "sft-") == (code, job_id[:4])
    assert "NO SUPERVISOR RUNS" in said
    assert "gpubroker service install" in said
    assert ("running", True, None) == (row.state, row.unattended, row.supervisor_id)
    assert "print('first')\n" == (found.folder / "train.py").read_text()
    assert ({"HF_TOKEN": "hf_very_secret"}, user.work / "gpubroker-out" / job_id) == (
        found.secrets,
        found.out,
    )
    assert b"hf_very_secret" not in b"".join(path.read_bytes() for path in user.root.glob("p.db*"))
    assert [("submitted", "sft")] == [(e["kind"], e["text"]) for e in user.told("events", job_id)["events"]]


def test_options_say_the_same_as_a_file_and_a_supervisor_that_is_there_is_told_of(
    user, records, store_of_user
):
    """What they say of the work is in the job's description: whoever runs it prices it as `run` would."""
    user.supervisor(store_of_user.database)
    words = ("--max-usd", "4", "--artifact", "out", "--out", "back", "--ingress-gb", "7", "--egress-gb", "3")
    told = user.told(*WORDS, *words, "--", "python3", "train.py", "--epochs", "3")
    spec = kept_job(records.job(told["id"])[2])
    assert True is told["supervised"]
    assert (("python3", "train.py", "--epochs", "3"), 7, 3) == (
        spec.command,
        spec.data.size,
        spec.artifacts.size,
    )
    assert user.work / "back" == kept.load(user.jobs_dir / told["id"]).out
    code, _, said = user.do(*WORDS, "--", "true")
    assert (0, True) == (code, "A supervisor runs it" in said)
    assert "no --store is given: when the node is lost, all its work is lost with it" in said


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        pytest.param((*WORDS,), 2, "say what to run: gpubroker submit --gpu", id="no command"),
        pytest.param(
            (*WORDS, "--secret", "MY_TOKEN", "--", "true"), 2, "MY_TOKEN is not set", id="no secret"
        ),
        pytest.param(
            (*WORDS, "--store", "s3://b/p", "--", "true"), 2, "GPUBROKER_STORE_ACCESS_KEY_ID", id="no key"
        ),
        pytest.param(
            (*WORDS, "--store", "volume:data", "--", "true"), 2, "no volume is called data", id="no volume"
        ),
        pytest.param((*WORDS, "--folder", "nowhere", "--", "true"), 2, "is not a folder", id="no folder"),
        pytest.param(
            (*WORDS, "--store", "ftp://x", "--", "true"), 2, "it is s3://bucket/prefix", id="no such store"
        ),
        pytest.param(
            (*WORDS, "--artifact", "a/../../b", "--", "true"),
            2,
            "'a/../../b' is not a path inside",
            id="outside",
        ),
        pytest.param(
            (*WORDS, "--artifact", "/etc", "--", "true"), 2, "'/etc' is not a path inside", id="absolute"
        ),
        pytest.param(
            (*WORDS, "--name", "../x", "--", "true"), 2, "'../x': small letters, digits", id="no name"
        ),
        pytest.param((*WORDS, "--provider", "vast", "--", "true"), 2, "vast: disabled", id="no vendor"),
        pytest.param((*WORDS, "--count", "8", "--", "true"), 3, "no such node there", id="no such node"),
        pytest.param((*WORDS, "--volume-gb", "9", "--", "true"), 2, "--volume-gb is not kept", id="not kept"),
    ],
)
def test_what_can_be_wrong_is_found_before_anything_is_kept(user, records, words, code, sentence):
    """One sentence; no job, and nothing on disk."""
    found, out, said = user.do(*words)
    assert (code, "", True) == (found, out, sentence in said), said
    assert [] == records.rows()
    assert [] == list(user.jobs_dir.glob("*"))


def test_a_place_for_jobs_that_cannot_be_made_is_named(user, records, monkeypatch):
    """And nothing waits there."""
    monkeypatch.setenv("GPUBROKER_JOBS_DIR", "/proc/jobs")
    code, _, said = user.do(*WORDS, "--", "true")
    assert (1, "gpubroker: cannot write /proc/jobs: No such file or directory") == (
        code,
        said.splitlines()[-1],
    )
    assert [] == records.rows()


def test_the_key_of_a_store_is_tried_and_kept_for_the_jobs_nodes(user, records, monkeypatch):
    """In its bucket; one that cannot be written is found before anything is kept."""
    pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")
    from gpubroker.testcloud.client import running
    from tests.test_cli_run import bucket

    words = (*WORDS, "--store", "s3://jobs/sft", "--", "true")
    with running(speed=10) as cloud, bucket(cloud) as store:
        for name, value in store.items():
            monkeypatch.setenv(name, value)
        code, out, said = user.do(*words)
        assert 0 == code, said
        wrong, _, said = user.do(*WORDS, "--store", "s3://nowhere/sft", "--", "true")
    keys = kept.load(user.jobs_dir / out.strip()).store
    found = (keys.where, keys.endpoint, keys.access_key, keys.secret_key)
    assert ("s3://jobs/sft", *(store[f"GPUBROKER_STORE_{name}"] for name in KEYS)) == found
    assert (2, True) == (wrong, "gpubroker: checkpoint.store: " in said)
    assert [out.strip()] == [row.id for row in records.rows()]
    secret = store["GPUBROKER_STORE_SECRET_ACCESS_KEY"].encode()
    assert secret not in b"".join(path.read_bytes() for path in user.root.glob("p.db*"))


def test_a_terminal_does_not_take_a_job_that_is_the_supervisors(user):
    """Both would look after its node."""
    job_id = user.submitted()
    code, _, said = user.do("run", "--resume", job_id)
    assert (2, True) == (code, f"gpubroker job resume {job_id}" in said)


def test_a_stopped_job_goes_on_unattended_with_what_was_kept(user, records):
    """Also when it was to be cancelled in between."""
    job_id = user.submitted()
    (user.work / "train.py").write_text("print('second')\n")
    records.want(job_id, "cancelled", "by hand")
    records.stop_jobs("stop-all")
    assert {"id": job_id, "supervised": False} == user.told("job", "resume", job_id)
    row = records.row(job_id)
    assert ("running", "", "", True) == (row.state, row.reason, row.wanted, row.unattended)
    assert "print('first')\n" == (kept.load(user.jobs_dir / job_id).folder / "train.py").read_text()


def test_a_job_of_a_terminal_that_is_gone_goes_on_unattended(user, records):
    """Its folder is kept now; while the terminal is there it is that one's."""
    spec = kept_job(records.job(user.submitted())[2])
    job_id = records.add_job("mine", spec.model_dump_json())
    hold = "import sys; from gpubroker.prices.database import Database as D; from gpubroker.doors import SystemClock as C\n"
    hold += "with D(sys.argv[1], C()).hold(sys.argv[2]): print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, user.url, f"job {job_id}"], **pipes) as terminal:
        assert b"held\n" == terminal.stdout.readline()
        code, _, said = user.do("job", "resume", job_id)
    assert (2, f"gpubroker: {job_id} is run by a terminal now: Ctrl-C there leaves it\n") == (code, said)
    assert {"id": job_id, "supervised": False} == user.told("job", "resume", job_id)
    assert (True, "print('first')\n") == (
        records.row(job_id).unattended,
        (kept.load(user.jobs_dir / job_id).folder / "train.py").read_text(),
    )


def test_what_cannot_go_on_says_why(user, records, monkeypatch):
    """Exit 2."""
    job_id = user.submitted()
    monkeypatch.setenv("GPUBROKER_JOBS_DIR", str(user.root / "elsewhere"))
    code, _, said = user.do("job", "resume", job_id)
    assert (2, True) == (code, f"{job_id} is not kept in {user.root}/elsewhere" in said)
    records.end_job(job_id, "failed", "exit code 3")
    for asked, sentence in (
        (job_id, f"{job_id} is failed: exit code 3"),
        ("job-x", "no job is called 'job-x'"),
    ):
        code, _, said = user.do("job", "resume", asked)
        assert (2, f"gpubroker: {sentence}\n") == (code, said)
