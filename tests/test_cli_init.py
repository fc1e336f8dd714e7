"""Setting up: keys are tried and kept nowhere, the own GPU is found, config.toml gets the cap of a day."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker import config
from gpubroker.cli import main
from gpubroker.cli.init import init
from gpubroker.testcloud.client import running

KEYS = ("VAST_API_KEY", "RUNPOD_API_KEY", "LAMBDA_API_KEY", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET")
OWN = """# mine
max_age = "45m"   # not too old
aws_regions = [
  "us-east-1",
]

[fees.runpod]
egress_usd_per_gb = "0.05"
"""


@pytest.fixture(scope="module")
def cloud():
    with running(speed=60) as cloud:
        yield cloud


@pytest.fixture
def path(cloud, monkeypatch, tmp_path):
    """The user's config.toml; vendors are on loopback, and no key is set."""
    for name, value in cloud.env.items():
        if name not in KEYS:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")
    monkeypatch.setenv("GPUBROKER_CONFIG", str(tmp_path / "config" / "config.toml"))
    monkeypatch.setenv("GPUBROKER_DISABLED_PROVIDERS", "local")  # the machine of the test may have a GPU
    return tmp_path / "config" / "config.toml"


@pytest.fixture
def ask(path):
    """`ask(*words, answers)` runs it: its exit code, output and errors."""

    def _ask(*words, answers=""):
        ran = CliRunner().invoke(init, list(words), input=answers)
        return ran.exit_code, ran.stdout, ran.stderr

    return _ask


def answers(cloud, keys=KEYS, *, rest="\n"):
    """What is typed, in the order of the providers' names."""
    order = ("LAMBDA_API_KEY", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "RUNPOD_API_KEY", "VAST_API_KEY")
    lines = []
    for name in order:
        if name in keys:
            lines.append(cloud.env[name])
        elif name != "MODAL_TOKEN_SECRET":  # who gives no id is not asked for the secret
            lines.append("")
    return "\n".join(lines) + "\n" + rest


def test_keys_that_are_typed_are_tried_and_nowhere_afterwards(ask, cloud, path):
    """Not in the output, the environment, the config, the database or any other file."""
    code, out, said = ask(answers=answers(cloud))
    assert (0, 4) == (code, sum(" ok " in line for line in out.splitlines() if line.split()[0] in VENDORS)), (
        out + said
    )
    told = out + said
    kept = b"".join(
        file.read_bytes()
        for folder in (path.parents[1], Path(os.environ["HOME"]))
        for file in folder.rglob("*")
        if file.is_file()
    )
    for name in KEYS:
        assert f"export {name}=...\n" in said
        assert cloud.env[name] not in told
        assert name not in os.environ
        assert cloud.env[name].encode() not in kept


VENDORS = ("lambda", "modal", "runpod", "vast")


def test_who_has_no_account_presses_enter(ask, path):
    """All goes on without; nothing is wrong."""
    code, out, said = ask(answers="\n" * 4 + "25\n")
    assert (0, "usd_per_day = 25\n") == (code, path.read_text()), out + said
    assert "LAMBDA_API_KEY is not set" in out
    assert "export" not in said


@pytest.mark.parametrize("name", ["VAST_API_KEY", "MODAL_TOKEN_SECRET"])
def test_a_key_that_is_refused_may_be_typed_again(ask, cloud, name):
    """What was wrong is said, without the key."""
    right = cloud.env[name]
    pair = ["", cloud.env["MODAL_TOKEN_ID"]]
    lines = {
        "VAST_API_KEY": ["", "", "", "wrong-key-of-mine", right, ""],
        "MODAL_TOKEN_SECRET": [*pair, "wrong-key-of-mine", pair[1], right, "", "", ""],
    }
    code, out, said = ask(answers="\n".join([*lines[name], ""]))
    assert (0, True) == (code, f"export {name}=..." in said), out + said
    assert "wrong-key-of-mine" not in out + said


def test_the_config_keeps_what_is_in_it_to_the_comment(ask, path):
    """Only the two keys change."""
    path.parent.mkdir()
    path.write_text(OWN)
    path.chmod(0o640)
    code, _, said = ask("--yes", "--usd-per-day", "12.5", "--usd-per-kwh", "0.31")
    assert 0 == code, said
    lines = path.read_text().splitlines()
    assert OWN.splitlines() == [line for line in lines if not line.startswith(("usd_per_day", "local_usd"))]
    assert 0o640 == path.stat().st_mode & 0o777
    settings = config.load()
    assert ("12.5", "0.31", 2700) == (
        str(settings.usd_per_day),
        str(settings.local_usd_per_kwh),
        settings.max_age_s,
    )
    assert [path.name] == [file.name for file in path.parent.iterdir()]
    before = path.stat().st_ino
    assert 0 == ask("--yes")[0]
    assert before == path.stat().st_ino


def test_a_config_that_is_a_link_stays_one(ask, path, tmp_path):
    """People keep theirs in a folder under version control."""
    path.parent.mkdir()
    (tmp_path / "dotfiles.toml").write_text("usd_per_day = 7\n")
    path.symlink_to(tmp_path / "dotfiles.toml")
    assert 0 == ask("--yes", "--usd-per-day", "8")[0]
    assert (True, "usd_per_day = 8\n") == (path.is_symlink(), (tmp_path / "dotfiles.toml").read_text())


def test_with_yes_nothing_is_asked_and_the_keys_are_the_environments(ask, cloud, path, monkeypatch):
    """For scripts: JSON alone on standard output."""
    monkeypatch.setenv("VAST_API_KEY", cloud.env["VAST_API_KEY"])
    code, out, said = ask("--yes", "--format", "json")
    told = json.loads(out)
    verdicts = {check["what"]: check["verdict"] for check in told["checks"]}
    assert (0, "", "ok", "warn") == (code, said, verdicts["vast"], verdicts["runpod"])
    assert ({"usd_per_day": "100"}, [], str(path)) == (told["settings"], told["profile"], told["config"])
    assert "usd_per_day = 100\n" == path.read_text()


def test_a_key_of_the_environment_that_is_refused_is_exit_2(ask, monkeypatch):
    """A script stops there."""
    monkeypatch.setenv("RUNPOD_API_KEY", "not-the-key")
    code, out, said = ask("--yes")
    assert (2, False) == (code, "not-the-key" in out + said)


def test_a_gpu_of_ones_own_is_found_and_its_electricity_asked_for(ask, path, monkeypatch):
    """Here one that is declared."""
    monkeypatch.delenv("GPUBROKER_DISABLED_PROVIDERS")
    monkeypatch.setenv("GPUBROKER_LOCAL_GPUS", "rtx4090:2")
    code, out, said = ask(answers="\n" * 4 + "x\n0.30\n\n")
    assert (0, True) == (code, "2x RTX4090" in out), out + said
    assert 'local_usd_per_kwh = "0.30"' in path.read_text()
    assert "'x' is not a number" in said


def test_a_variable_that_overrules_the_config_is_told(ask, monkeypatch):
    """What is asked for here would not be in force."""
    monkeypatch.setenv("GPUBROKER_USD_PER_DAY", "5")
    code, _, said = ask("--yes", "--usd-per-day", "50")
    assert (0, True) == (code, "GPUBROKER_USD_PER_DAY is set in your environment: it wins" in said)


def test_a_config_that_is_wrong_or_cannot_be_written_is_one_sentence(path, monkeypatch, capsys, tmp_path):
    """Exit 2, and it is as it was."""
    path.parent.mkdir()
    path.write_text("usd_per_day = [")
    assert 2 == main(["init", "--yes"])
    assert str(path) in capsys.readouterr().err
    assert "usd_per_day = [" == path.read_text()
    monkeypatch.setenv("GPUBROKER_CONFIG", str(path / "config.toml"))
    assert 2 == main(["init", "--yes"])
    assert "config.toml" in capsys.readouterr().err
