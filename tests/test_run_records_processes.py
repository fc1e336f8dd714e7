"""The cap of a day, with launchers in several processes on one database: real ones."""

import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

from gpubroker.prices.store import Store
from gpubroker.run.records import Records
from gpubroker.testing import FakeClock

REPOSITORY = Path(__file__).parents[1]
# A `run` that takes node after node at $1/h until the day's $10 are reserved; it begins when it is told to.
LAUNCHER = """
import sys
from decimal import Decimal
from gpubroker.errors import OverBudget
from gpubroker.prices.store import Store
from gpubroker.run.records import Caps, Records
from gpubroker.testing import FakeClock
from tests.test_bill import offer

clock = FakeClock()
with Store.open(sys.argv[1], clock) as store:
    store.migrate()
    records = Records(store.database, clock)
    job = records.add_job("job", "{}")
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        while True:
            caps = Caps(usd_per_day=Decimal(10), usd_per_job=Decimal(7))
            records.intend(job, offer(), usd_per_hour=Decimal(1), bid=None, caps=caps)
    except OverBudget as error:
        print(error)
"""


def test_launchers_in_four_processes_keep_to_the_cap_of_a_day_together(empty_url):
    """The check and the intent are one transaction: ten nodes, whoever gets them, and never an eleventh."""
    command = [sys.executable, "-c", LAUNCHER, empty_url]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    launchers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=env
        )
        for _ in range(4)
    ]
    assert ["ready\n"] * 4 == [launcher.stdout.readline() for launcher in launchers]
    for launcher in launchers:
        launcher.stdin.write("go\n")
        launcher.stdin.flush()
    said = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    assert [0] * 4 == [launcher.returncode for launcher in launchers]
    assert all(text.startswith(("the limit of today", "the limit of this job")) for text in said)
    with Store.open(empty_url, FakeClock()) as store:
        attempts = Records(store.database, FakeClock()).open_attempts()
    assert Decimal(10) == sum(attempt.usd_per_hour for attempt in attempts)
    jobs = [attempt.job_id for attempt in attempts]
    assert all(jobs.count(job) <= 7 for job in jobs)
    assert len({attempt.tag for attempt in attempts}) == 10
