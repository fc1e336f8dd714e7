"""A job.toml, right and wrong."""

from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.errors import ConfigError
from gpubroker.jobspec import kept_job, parse_job
from tests.support import NOW

WHOLE = """
version = 1
name = "llama-lora"
command = ["python", "train.py", "--epochs", "3"]
setup = ["pip install -r requirements.txt"]
folder = "."
ignore = ["data/", ".git"]
image = "pytorch/pytorch:2.13.0-cuda12.8-cudnn9-runtime"
secrets = ["HF_TOKEN"]
ports = [8888]
disk = "200GB"
exit_codes = { 75 = "retry" }

[env]
WANDB_MODE = "offline"

[gpu]
name = ["h100-sxm", "a100-80gb"]
count = 2
min_vram = "40GiB"

[work]
amount = "8h@h100-sxm"
bound = "0.7"

[limits]
deadline = "36h"
budget_usd = 120.5
max_hours = 30

[where]
markets = ["spot", "on-demand"]
providers = "vast"
regions = ["us", "eu"]

[checkpoint]
folder = "out"
size = "12GB"
save_time = "40s"
every = "10m"
store = "s3://bucket/llama"

[data]
size = "120GB"
at = "aws"

[artifacts]
paths = ["out/final"]
size = "2GB"

[waste]
after = "45m"
then = "end"
"""
LEAST = '[gpu]\nname = "h100"\n[work]\nhours = 8\n'


def read(text):
    return parse_job(text, NOW, "job.toml")


def test_a_whole_job_is_read_with_its_units():
    """Sizes are gigabytes, durations seconds, the deadline a moment."""
    job = read(WHOLE)
    assert ("h100-sxm", "a100-80gb") == job.gpu.name
    assert Decimal("42.94967296") == job.gpu.min_vram
    assert NOW + timedelta(hours=36) == job.limits.deadline
    assert Decimal("120.5") == job.limits.budget_usd
    assert ("spot", "on_demand") == job.where.markets
    assert ("vast",) == job.where.providers
    assert (Decimal(12), 40, 600) == (job.checkpoint.size, job.checkpoint.save_time, job.checkpoint.every)
    assert Decimal(120) == job.data.size
    assert {"75": "retry"} == job.exit_codes
    assert (2700, "end") == (job.waste.after, job.waste.then)


def test_the_readmes_job_is_read():
    """As it stands there."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    job = read(readme.split("## A job as a file")[1].split("```toml")[1].split("```")[0])
    assert ("sft-8b", Decimal(40), Decimal(30)) == (job.name, job.work.hours, job.checkpoint.size)


def test_a_short_job_has_every_default():
    """Only the card and the hours are needed."""
    job = read(LEAST)
    assert (Decimal(8), 1, Decimal(50), "job") == (job.work.hours, job.gpu.count, job.disk, job.name)
    assert (None, 1200, "tell") == (job.limits.deadline, job.waste.after, job.waste.then)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        pytest.param('[limits]\ndeadline = "8 hrs"', "limits.deadline: '8 hrs' is not a time", id="deadline"),
        pytest.param(
            "[limits]\ndeadline = 2020-01-01T00:00:00Z", "limits.deadline: .* has passed", id="passed"
        ),
        pytest.param("[limits]\nbudget_usd = -3", "limits.budget_usd: .*greater than 0", id="budget"),
        pytest.param("[limits]\nbudget_usd = nan", "limits.budget_usd: .*finite", id="nan"),
        pytest.param('[checkpoint]\nsize = "12"', "checkpoint.size: '12' has no unit", id="no-unit"),
        pytest.param("[checkpoint]\nsize = 12", "checkpoint.size: '12' has no unit", id="bare-number"),
        pytest.param('[checkpoint]\nevery = "10"', "checkpoint.every: '10' is not a duration", id="every"),
        pytest.param('[where]\nmarkets = ["cheap"]', "where.markets.0: 'cheap' is not one of", id="market"),
        pytest.param('[whre]\nmarkets = ["spot"]', "unknown key 'whre'", id="unknown-key"),
        pytest.param('[data]\nsise = "1GB"', "unknown key 'data.sise'", id="unknown-nested-key"),
        pytest.param("[waste]\nafter = 20", "waste.after: '20' is not a duration", id="waste-no-unit"),
        pytest.param(
            '[waste]\nafter = "0m"', "waste.after: .*greater than or equal to 1", id="waste-at-once"
        ),
        pytest.param('[waste]\nthen = "kill"', "waste.then: .*'tell' or 'end'", id="waste-then"),
        pytest.param('[waste]\nwhen = "20m"', "unknown key 'waste.when'", id="waste-key"),
        pytest.param("[[gpu", "job.toml: ", id="broken-toml"),
    ],
)
def test_a_wrong_job_is_told_in_one_sentence(extra, sentence):
    """Which names the file and the key."""
    with pytest.raises(ConfigError, match=f"^job.toml: .*{sentence}" if "toml" not in sentence else sentence):
        read(LEAST + extra)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param('[gpu]\nname = "h100"', "work is missing", id="no-work"),
        pytest.param("[work]\nhours = 8", "say which GPU", id="no-gpu"),
        pytest.param(
            '[gpu]\nname = "h9000"\n[work]\nhours = 8', "gpu.name.0: no GPU is called 'h9000'", id="card"
        ),
        pytest.param(
            '[gpu]\nname = "h100"\n[work]\nhours = -8', "work.hours: .*greater than or equal to", id="hours"
        ),
        pytest.param('[gpu]\nname = "h100"\n[work]\nhours = nan', "work.hours: .*finite", id="nan-hours"),
        pytest.param('[gpu]\nname = "h100"\n[work]\n', "work: give either hours", id="neither"),
        pytest.param(f"nodes = 2\n{LEAST}", "nodes: 2 nodes: a job runs on one machine", id="nodes"),
        pytest.param(f'secrets = ["hf_xyz=1"]\n{LEAST}', "secrets: list names of variables", id="secret"),
        pytest.param(f"version = 2\n{LEAST}", "version: ", id="version"),
        pytest.param(f'name = "Ä b"\n{LEAST}', "name: ", id="name"),
        pytest.param('[gpu]\nname = "h100"\ncount = 0\n[work]\nhours = 8', "gpu.count: ", id="count"),
        pytest.param('[gpu]\nname = "h100"\ncount = true\n[work]\nhours = 8', "gpu.count: ", id="bool"),
    ],
)
def test_a_job_that_lacks_something_is_told_what(text, sentence):
    """One sentence, no traceback."""
    with pytest.raises(ConfigError, match=f"^job.toml: {sentence}") as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_a_secret_given_by_value_is_not_repeated():
    """The sentence goes to logs."""
    with pytest.raises(ConfigError) as caught:
        read(f'secrets = ["hf_abc def"]\n{LEAST}')
    assert "hf_abc" not in str(caught.value)


@given(st.text(max_size=200))
def test_no_text_makes_a_traceback(text):
    """Whatever the file holds: a job, or one sentence; ConfigError is the only exception."""
    with suppress(ConfigError):
        read(text)


@pytest.mark.parametrize("text", [pytest.param(WHOLE, id="whole"), pytest.param(LEAST, id="least")])
def test_a_job_is_read_again_from_its_record(text):
    """As it was, long after its deadline has passed."""
    job = read(text)
    assert job == kept_job(job.model_dump_json())


def test_a_box_without_an_end_is_refused():
    """It would bill for ever: nobody supervises it."""
    with pytest.raises(ConfigError, match=r"limits\.max_hours: a box needs an end"):
        read(f"box = true\n{LEAST}")
