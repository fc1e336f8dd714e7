"""A user whose only vendor is their own machine, for tests of the commands around a supervisor.

conftest.py makes a pytest plugin of this file: its fixtures are `user` and `records`.
"""

import json
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

from gpubroker.cli import main
from gpubroker.doors import SystemClock
from gpubroker.prices.store import Store
from gpubroker.run.leases import Leases
from gpubroker.run.records import Caps, Checkpoint, Records
from tests.test_bill import offer

FREE = Caps(usd_per_day=None)


@dataclass
class User:
    """Commands are typed in `work`, where a job's files are."""

    capture: object  # of bytes: a job may print any
    root: Path  # that the database is in
    url: str

    @property
    def work(self):
        return self.root / "w"

    @property
    def jobs_dir(self):
        return self.root / "jobs"

    def ran(self, *words):
        """Exit code, the bytes that were printed, what was said."""
        self.capture.readouterr()
        code = main(list(words))
        printed, said = self.capture.readouterr()
        return code, printed, said.decode()

    def do(self, *words):
        """Exit code, what was printed, what was said."""
        code, printed, said = self.ran(*words)
        return code, printed.decode(), said

    def told(self, *words):
        """What is printed as JSON."""
        at = words.index("--") if "--" in words else len(words)
        code, out, said = self.do(*words[:at], "--format", "json", *words[at:])
        assert 0 == code, said
        return json.loads(out)

    def submitted(self, *words):
        """The id of a job."""
        return self.told("submit", "--gpu", "4090", "--hours", "2", *words, "--", "python3", "train.py")["id"]

    def supervisor(self, database):
        """One that is there."""
        leases = Leases(database, SystemClock(), host="here", pid=1)
        leases.renew()
        return leases


class Busy(SystemClock):
    """Something happens while somebody waits; at last they leave."""

    def __init__(self, *steps):
        self._steps = list(steps)

    def sleep(self, seconds):
        if not self._steps:
            raise KeyboardInterrupt
        self._steps.pop(0)()


@pytest.fixture
def user(tmp_path, monkeypatch, capfdbinary):
    for name, value in {
        "GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/p.db",
        "GPUBROKER_JOBS_DIR": str(tmp_path / "jobs"),
        "GPUBROKER_DISABLED_PROVIDERS": "vast,runpod,lambda,modal,aws",
        "GPUBROKER_LOCAL_GPUS": "rtx4090",
    }.items():
        monkeypatch.setenv(name, value)
    found = User(capfdbinary, tmp_path, f"sqlite:///{tmp_path}/p.db")
    found.work.mkdir()
    (found.work / "train.py").write_text("print('first')\n")
    monkeypatch.chdir(found.work)
    return found


@pytest.fixture
def store_of_user(user):
    with Store.open(user.url, SystemClock()) as store:
        store.migrate()
        yield store


@pytest.fixture
def records(store_of_user):
    """The user's database, as a supervisor writes it."""
    return Records(store_of_user.database, SystemClock())


def rented(records, job_id, *, provider="vast", usd=2, node="n-1", **more):
    """A node that runs."""
    what = offer(provider=provider, usd_per_hour=Decimal(usd), **more)
    attempt = records.intend(job_id, what, usd_per_hour=what.usd_per_hour, bid=None, caps=FREE)
    return records.running(records.created(attempt, node))


def saved(records, attempt, number, at):
    """A checkpoint of it."""
    made = Checkpoint(
        epoch=attempt.epoch, number=number, name=f"step-{number}", step=number, bytes=7, published_at=at,
        place=f"s3://b/{number}",
    )  # fmt: skip
    records.published(attempt.job_id, [made])
