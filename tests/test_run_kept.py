"""What is kept of a job that a supervisor runs: whole before anybody can see the job, secret, gone at its end."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from gpubroker.errors import ConfigError
from gpubroker.jobspec import job_from
from gpubroker.run import kept
from gpubroker.run.contact import keys_of
from gpubroker.run.payload import StoreKeys
from tests.support import NOW

STORE = StoreKeys(where="s3://b/p", endpoint="http://s3", access_key="AK", secret_key="the secret")
# Dies at the n-th thing that it does to a file or a database, for each n until one gets through.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from gpubroker.doors import SystemClock
from gpubroker.jobspec import job_from
from gpubroker.prices.store import Store
from gpubroker.run import kept, shell
from gpubroker.run.records import Records

root, clock = Path(sys.argv[1]), SystemClock()
spec = job_from({"command": ["true"], "folder": str(root / "w"), "gpu": {"name": "4090"}, "work": {"hours": 1}},
                clock.now(), "test")
url, watched = f"sqlite:///{root}/p.db", ("os.", "shutil.", "open", "sqlite3.")
with Store.open(url, clock) as store:
    store.migrate()

def submit(job_id):
    kept.keep(root / "jobs" / job_id, spec, secrets={"T": "s"}, store=None, out=root / "out", now=clock.now())
    with Store.open(url, clock) as store:
        Records(store.database, clock).add_job("job", spec.model_dump_json(), unattended=True, job_id=job_id)

shell.make_key()  # imports what a child need not
for number in range(1, 1000):
    pid = os.fork()
    if pid == 0:
        left = [number]
        def count(event, args):
            if event.startswith(watched):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        submit(f"job-{number}")
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        break
print(number)
"""


@pytest.fixture
def work(tmp_path):
    """A working folder with what is sent and what is not."""
    folder = tmp_path / "w"
    (folder / "src").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    (folder / "big.bin").write_text("x")
    (folder / "src" / "run.sh").write_text("echo first\n")
    (folder / "src" / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("src/run.sh")
    return folder


def spec(folder, **more):
    told = {"command": ["true"], "folder": str(folder), "gpu": {"name": "4090"}, "work": {"hours": 1}, **more}
    return job_from(told, NOW, "test")


def keep(tmp_path, folder, **more):
    place = tmp_path / "jobs" / "job-1"
    told = {"secrets": {"HF_TOKEN": "hf_secret"}, "store": STORE, "out": Path("back"), "now": NOW, **more}
    kept.keep(place, spec(folder, ignore=["*.bin"]), **told)
    return place


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_what_was_submitted_is_what_runs_whatever_is_edited_later(tmp_path, work, monkeypatch):
    """With modes and links, without what the job ignores; artifacts go where it was submitted from."""
    monkeypatch.chdir(tmp_path)
    place = keep(tmp_path, work)
    (work / "src" / "run.sh").write_text("echo second\n")
    found = kept.load(place)
    assert ["link", "src/run.sh"] == names(found.folder)
    assert "echo first\n" == (found.folder / "link").read_text()
    assert (0o755, True) == (
        (found.folder / "src/run.sh").stat().st_mode & 0o777,
        (found.folder / "link").is_symlink(),
    )
    assert ({"HF_TOKEN": "hf_secret"}, STORE, tmp_path / "back") == (found.secrets, found.store, found.out)


def test_only_the_user_reads_what_is_secret_and_nothing_prints_it(tmp_path, work):
    """Files of mode 0600 in a folder of mode 0700."""
    place = keep(tmp_path, work)
    modes = [
        path.stat().st_mode & 0o777 for path in (place.parent, place, place / "kept.json", place / "key")
    ]
    assert [0o700, 0o700, 0o600, 0o600] == modes
    assert "secret" not in repr(kept.load(place))


def test_a_job_that_is_over_keeps_its_log_and_its_key_alone(tmp_path, work):
    """Twice is once; what loads it then says where it was looked for."""
    place = keep(tmp_path, work, store=None)
    kept.log_file(place, 1).parent.mkdir()
    kept.log_file(place, 1).write_text("hello")
    kept.forget(place)
    kept.forget(place)
    assert ["key", "log/0001.log"] == names(place)
    assert {1: kept.log_file(place, 1)} == kept.log_files(place)
    with pytest.raises(ConfigError, match=f"job-1 is not kept in {tmp_path}/jobs: set jobs_dir"):
        kept.load(place)


def test_a_folder_with_the_keys_of_jobs_in_it_is_refused(tmp_path, work):
    """They would go onto the node; where the job ignores them it is taken."""
    jobs = work / "jobs"
    keep(work, tmp_path / "w" / "src")
    with pytest.raises(ConfigError, match="where keys of jobs are"):
        kept.keep(jobs / "job-2", spec(work), secrets={}, store=None, out=tmp_path, now=NOW)
    assert ["job-1"] == [path.name for path in jobs.iterdir()]
    kept.keep(jobs / "job-2", spec(work, ignore=["jobs"]), secrets={}, store=None, out=tmp_path, now=NOW)
    assert ["big.bin", "link", "src/run.sh"] == names(kept.load(jobs / "job-2").folder)


def test_the_key_of_a_job_that_a_terminal_has_run_stays(tmp_path, work):
    """Its nodes know no other."""
    place = tmp_path / "jobs" / "job-1"
    before = keys_of(place).private
    keep(tmp_path, work)
    keep(tmp_path, work, secrets={})
    assert (before, {}) == (keys_of(place).private, kept.load(place).secrets)
    assert ["job-1"] == [path.name for path in place.parent.iterdir()]


def test_halves_of_a_process_that_was_killed_are_deleted_after_a_day(tmp_path, work):
    """A newer one may be another process's that is at it."""
    for name, age_s in (("old.part", 86401), ("new.part", 10)):
        (tmp_path / "jobs" / name).mkdir(parents=True)
        os.utime(tmp_path / "jobs" / name, (NOW.timestamp() - age_s,) * 2)
    keep(tmp_path, work)
    assert ["job-1", "new.part"] == sorted(path.name for path in (tmp_path / "jobs").iterdir())


def test_a_submit_that_is_killed_anywhere_leaves_no_half_job(tmp_path, work):
    """kill -9 at each thing that it does to a file or to the database: a job with a row has all that it needs."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    with sqlite3.connect(tmp_path / "p.db") as database:
        seen = [job_id for (job_id,) in database.execute("SELECT id FROM jobs")]
    assert int(done.stdout) > 20, done.stdout
    assert f"job-{int(done.stdout)}" in seen
    for job_id in seen:
        place = tmp_path / "jobs" / job_id
        assert ({"T": "s"}, ["big.bin", "link", "src/run.sh"]) == (
            kept.load(place).secrets,
            names(place / "work"),
        )
        assert (place / "key").exists()
