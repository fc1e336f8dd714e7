"""The supervisor as a service of the user's systemd: the unit, installing it twice, removing it."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpubroker.cli import main, service


@pytest.fixture
def unit():
    return service.unit_file()


@pytest.fixture
def systemctl(tmp_path, monkeypatch):
    """A systemctl that writes down what it is asked, and ends with the code in a file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "systemctl").write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\necho no bus >&2\nexit $(cat {tmp_path}/code 2>/dev/null)\n'
    )
    (folder / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_the_unit_starts_this_gpubroker_and_brings_it_back_whatever_ends_it(capsys, unit):
    """As systemd itself would read it; with no key in it."""
    assert 0 == main(["service", "install"])
    found = configparser.ConfigParser(interpolation=None)
    found.optionxform = str
    found.read(unit)
    words = found["Service"]["ExecStart"].split('" "')
    assert (f'"{Path(sys.executable).parent}/gpubroker', 'supervise"') == tuple(words)
    assert ("always", "-%h/.config/gpubroker/env") == (
        found["Service"]["Restart"], found["Service"]["EnvironmentFile"],
    )  # fmt: skip
    assert "default.target" == found["Install"]["WantedBy"]
    said = capsys.readouterr().err
    assert "systemctl --user daemon-reload && systemctl --user enable --now gpubroker.service" in said
    assert "loginctl enable-linger" in said


def test_what_the_supervisor_does_by_the_clock_is_passed_on(unit, tmp_path, monkeypatch):
    """A folder by its absolute path: the service is started elsewhere."""
    monkeypatch.chdir(tmp_path)
    options = ("--poll-every", "5m", "--export", "out", "--as", "csv", "--export-every", "12h")
    assert 0 == main(["service", "install", *options])
    (line,) = (line for line in unit.read_text().splitlines() if line.startswith("ExecStart"))
    assert line.endswith(
        f'"supervise" "--poll-every" "5m" "--export" "{tmp_path}/out/" "--as" "csv" "--cursor" "scheduled"'
        ' "--export-every" "12h"'
    )


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_unit(unit):
    """Neither an unknown key nor a program that is not there."""
    assert 0 == main(["service", "install"])
    env = {**os.environ, "XDG_RUNTIME_DIR": str(unit.parent)}
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert (0, []) == (done.returncode, [line for line in done.stderr.splitlines() if "gpubroker" in line])


def test_a_path_with_any_character_is_one_word_for_systemd():
    """Specifiers and variables are not its own."""
    text = service.unit_text(['/home/a b/100%/$x/"q"\\/gpubroker'])
    assert 'ExecStart="/home/a b/100%%/$$x/\\"q\\"\\\\/gpubroker" "supervise"\n' in text


def test_no_key_is_copied_and_what_the_service_will_not_know_is_named(capsys, monkeypatch, unit):
    """Names only; a file that others may read is told."""
    monkeypatch.setenv("VAST_API_KEY", "vast_secret")
    monkeypatch.setenv("RUNPOD_API_KEY", "runpod_secret")
    place = Path.home() / ".config" / "gpubroker" / "env"
    place.parent.mkdir(parents=True)
    place.write_text("RUNPOD_API_KEY=x\n")
    place.chmod(0o644)
    assert 0 == main(["service", "install"])
    said = capsys.readouterr().err
    assert "not there: AWS_EC2_METADATA_DISABLED, VAST_API_KEY\n" in said
    assert f"Others may read {place}: chmod 600" in said
    assert "secret" not in said + unit.read_text()


def test_installing_twice_is_once_and_a_changed_unit_is_started_again(capsys, unit, systemctl):
    """With --now by systemctl itself."""
    for _ in range(2):
        assert 0 == main(["service", "install", "--now"])
    assert f"{unit} is there already\n" in capsys.readouterr().err
    first = unit.read_text()
    unit.write_text(first.replace("RestartSec=10", "RestartSec=1"))
    assert 0 == main(["service", "install", "--now"])
    assert [first, [unit]] == [unit.read_text(), list(unit.parent.iterdir())]
    twice = ["--user daemon-reload", "--user enable --now gpubroker.service"]
    asked = (systemctl / "asked").read_text().splitlines()
    assert [*twice * 3, "--user restart gpubroker.service"] == asked


def test_what_systemctl_refuses_is_said(capsys, unit, systemctl):
    """Exit 2; it can be removed all the same."""
    (systemctl / "code").write_text("1")
    assert 2 == main(["service", "install", "--now"])
    assert "systemctl --user daemon-reload: no bus" in capsys.readouterr().err
    assert 0 == main(["service", "remove"])
    assert not unit.exists()


def test_removing_stops_it_and_twice_is_once(capsys, unit, systemctl):
    """Nothing of it is left."""
    assert 0 == main(["service", "install"])
    for _ in range(2):
        assert 0 == main(["service", "remove"])
    assert [] == list(unit.parent.iterdir())
    assert ["--user disable --now gpubroker.service"] == (systemctl / "asked").read_text().splitlines()
    assert f"{unit} is not there" in capsys.readouterr().err


def test_show_prints_what_is_installed_or_would_be(capsys, unit):
    """On standard output the unit alone."""
    assert 0 == main(["service", "show"])
    shown = capsys.readouterr()
    assert (service.unit_text(service.command()), True) == (
        shown.out,
        "service install writes this" in shown.err,
    )
    assert 0 == main(["service", "install"])
    unit.write_text("[Unit]\n")
    capsys.readouterr()
    assert 0 == main(["service", "show"])
    assert "[Unit]\n" == capsys.readouterr().out
