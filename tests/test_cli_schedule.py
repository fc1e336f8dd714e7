"""`gpubroker schedule`: lines of a crontab and systemd timers, by a crontab and a systemctl that write things down."""

import configparser
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.cli import crontab, main, units
from gpubroker.cli.upkeep import Export, Upkeep
from gpubroker.errors import ConfigError
from gpubroker.testing import Answer
from gpubroker.units import parse_duration_s
from tests.loopback import vendor
from tests.support import PAYLOADS

TYPES = Answer(body=(PAYLOADS / "lambda/instance_types.json").read_text())
ROUTE = ("GET", "/api/v1/instance-types")
MINE = b"# mine \xff\r\nMAILTO=me\n\n0 0 * * * date +\\%s # gpubroker\n"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A crontab that keeps a file `tab`, a systemctl that writes down what it is asked; each fails by a file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "crontab": """
[ -e fails ] && { echo "not allowed" >&2; exit 1; }
case "$1" in
-l) [ -e tab ] || { echo "no crontab for me" >&2; exit 1; }; cat tab ;;
-) cat >tab; echo x >>writes ;;
esac""",
        "systemctl": """
echo "$@" >>asked
[ -e fails ] && { echo "no bus" >&2; exit 1; }
exit 0""",
    }
    for name, text in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\ncd {tmp_path}{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ask(capsys):
    """`ask(*words)` -> exit code, what was printed, what was said."""

    def _ask(*words):
        capsys.readouterr()
        code = main(["schedule", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return _ask


def lines_of(tab):
    return [
        line for line in tab.read_bytes().removeprefix(MINE).decode().splitlines() if "schedule run" in line
    ]


def words_of(line):
    """As cron cuts a line, and the shell behind it."""
    fields, command = line.split(" ", 5)[:5], line.split(" ", 5)[5]
    return " ".join(fields), shlex.split(command.replace("\\%", "%"))


def places():
    """What the tests' own environment says of where things are."""
    home = Path.home()
    return [f"XDG_{kind}_HOME={home}" for kind in ("CONFIG", "DATA", "CACHE")]


def test_a_poll_every_five_minutes_is_a_line_of_the_crontab(ask, tools):
    """After the user's own, which stay as they are to the byte; by this very program, and with no key."""
    (tools / "tab").write_bytes(MINE)
    code, out, said = ask("install")
    assert (0, "") == (code, out)
    after = (tools / "tab").read_bytes()
    assert after.startswith(MINE)
    assert [crontab.BEGIN, crontab.END] == [after.decode("latin-1").splitlines()[at] for at in (4, 6)]
    (line,) = lines_of(tools / "tab")
    gpubroker = str(Path(sys.executable).with_name("gpubroker"))
    assert ("*/5 * * * *", ["env", *places(), gpubroker, "schedule", "run", "poll"]) == words_of(line)
    assert f"Its words are in {Path.home()}/.local/state/gpubroker/schedule.log" in said


def test_twice_is_once_and_another_schedule_replaces_the_first(ask, tools):
    """Where it stood: what the user has written below it stays below it."""
    (tools / "tab").write_bytes(MINE)
    assert (0, 0) == (ask("install")[0], ask("install")[0])
    assert ["x"] == (tools / "writes").read_text().split()
    with (tools / "tab").open("ab") as file:
        file.write(b"@daily true")
    export = ("--export", "100% mine", "--as", "csv.gz", "--cursor", "nightly", "--export-every", "6h")
    assert 0 == ask("install", "--poll-every", "1h", *export)[0]
    poll, more = map(words_of, lines_of(tools / "tab"))
    assert ("7 * * * *", "poll") == (poll[0], poll[1][-1])
    to = f"{tools}/100% mine/"
    assert ("7 */6 * * *", ["export", "--to", to, "--as", "csv.gz", "--cursor", "nightly"]) == (
        more[0], more[1][-7:],
    )  # fmt: skip
    after = (tools / "tab").read_bytes()
    assert (True, True) == (after.startswith(MINE), after.endswith(b"\n@daily true"))
    assert 0 == ask("remove")[0]
    assert MINE + b"@daily true" == (tools / "tab").read_bytes()
    assert "Nothing is installed." in ask("remove")[2]


def test_a_dry_run_writes_nothing(ask, tools):
    """It prints what it would write."""
    code, out, _ = ask("install", "--dry-run")
    assert (0, [crontab.BEGIN, crontab.END]) == (code, out.splitlines()[::2])
    code, out, _ = ask("install", "--systemd", "--dry-run")
    assert (0, 2) == (code, out.count("[Install]") + out.count("[Service]"))
    assert [] == [name for name in ("tab", "writes", "asked") if (tools / name).exists()]
    assert not units.unit_folder().exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("--poll-every", "7m"), "cron cannot say that; the next that it can is 10m", id="7m"),
        pytest.param(("--poll-every", "90m"), "--poll-every 90m: cron cannot say that; the next", id="90m"),
        pytest.param(("--poll-every", "30s"), "the next that it can is 1m", id="30s"),
        pytest.param(("--poll-every", "5s"), "5s is less than 30s", id="5s"),
        pytest.param(("--poll-every", "8d"), "cron cannot say that; the most is 7d", id="8d"),
        pytest.param(
            ("--export", "x", "--as", "csv", "--export-every", "5h"),
            "--export-every 5h: cron cannot",
            id="5h",
        ),
        pytest.param(("--export", "x"), "--export needs --as csv", id="no kind"),
        pytest.param(("--as", "csv"), "--export says where to", id="no place"),
        pytest.param(("--export", "-", "--as", "csv"), "files are added, to a folder/", id="standard output"),
        pytest.param(("--export", "x.csv", "--as", "csv"), "files are added, to a folder/", id="a file"),
        pytest.param(("--export", "a\nb", "--as", "csv"), "no line with control characters", id="two lines"),
        pytest.param(("--cron", "--systemd"), "one of them", id="both"),
    ],
)
def test_what_cannot_be_scheduled_is_one_sentence(ask, tools, words, sentence):
    """Exit 2, and nothing is written."""
    code, out, said = ask("install", *words)
    assert (2, "", True) == (code, out, sentence in said), said
    assert not (tools / "tab").exists()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        pytest.param(lambda at: (at / "fails").touch(), "gpubroker: crontab -l: not allowed\n", id="refused"),
        pytest.param(
            lambda at: (at / "tab").write_text(f"{crontab.BEGIN}\n* * * * * true\n"),
            "one of gpubroker's two comments without the other",
            id="half of it",
        ),
        pytest.param(
            lambda at: (at / "tab").write_text(f"{crontab.END}\n{crontab.BEGIN}\n"),
            "one of gpubroker's two comments without the other",
            id="the wrong way round",
        ),
    ],
)
@pytest.mark.parametrize("command", ["install", "remove"])
def test_a_crontab_that_cannot_be_changed_safely_stays(ask, tools, spoil, sentence, command):
    """Exit 2, in one sentence."""
    spoil(tools)
    before = (tools / "tab").exists() and (tools / "tab").read_bytes()
    code, out, said = ask(command)
    assert (2, "", True) == (code, out, sentence in said), said
    assert before == ((tools / "tab").exists() and (tools / "tab").read_bytes())


def test_a_password_is_in_no_crontab(ask, tools, monkeypatch):
    """Nor what the user's own file has; where the database is, is."""
    monkeypatch.setenv("VAST_API_KEY", "vast_secret")
    for url in ("postgresql://me:s3cret@db/prices", "postgresql:///prices?user=me&password=s3cret"):
        monkeypatch.setenv("GPUBROKER_DB_URL", url)
        code, _, said = ask("install")
        assert (2, True, False) == (code, "holds a password" in said, "s3cret" in said)
    file = Path.home() / units.ENVIRONMENT
    file.parent.mkdir(parents=True)
    file.write_text(f"GPUBROKER_DB_URL='{url}'\n# not this\nVAST_API_KEY=other\n")
    file.chmod(0o600)
    assert 0 == ask("install")[0]
    assert "DB_URL" not in (tools / "tab").read_text()
    assert {"GPUBROKER_DB_URL": url, "VAST_API_KEY": "other"} == units.variables()
    file.unlink()
    monkeypatch.setenv("GPUBROKER_DB_URL", "sqlite:///here.db")
    (tools / "c.toml").touch()
    monkeypatch.setenv("GPUBROKER_CONFIG", "c.toml")
    code, _, said = ask("install")
    (line,) = lines_of(tools / "tab")
    assert [f"GPUBROKER_CONFIG={tools}/c.toml", f"GPUBROKER_DB_URL=sqlite:///{tools}/here.db"] == [
        word for word in words_of(line)[1] if word.startswith("GPUBROKER")
    ]
    assert (0, True) == (code, "Set here and not there: AWS_EC2_METADATA_DISABLED, VAST_API_KEY\n" in said)
    assert "secret" not in said + (tools / "tab").read_text()


def test_the_line_polls_as_cron_runs_it(ask, tools, monkeypatch):
    """By a bare shell in a bare environment: keys from the user's file, words in the log, then an export."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tools}/100%.db")
    monkeypatch.setenv("GPUBROKER_DISABLED_PROVIDERS", "vast,runpod,modal,aws,local")
    file = Path.home() / units.ENVIRONMENT
    file.parent.mkdir(parents=True)
    log = Path.home() / ".local/state/gpubroker/schedule.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"x" * 1_000_001)
    with vendor({ROUTE: TYPES}) as server:
        disabled = os.environ["GPUBROKER_DISABLED_PROVIDERS"]
        file.write_text(
            f'LAMBDA_API_KEY="secret-key"\nGPUBROKER_LAMBDA_URL={server.url}\n'
            f"GPUBROKER_DISABLED_PROVIDERS={disabled}\n"
        )
        assert 0 == ask("install", "--export", "out", "--as", "csv")[0]
        bare = {
            "HOME": str(Path.home()),
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }
        for line in lines_of(tools / "tab"):
            command = line.split(" ", 5)[5].replace("\\%", "%")
            ran = subprocess.run(
                ["/bin/sh", "-c", command], env=bare, cwd="/", capture_output=True, check=False
            )
            assert (0, b"", b"") == (ran.returncode, ran.stdout, ran.stderr)
        assert ["Bearer secret-key"] == [request.headers["authorization"] for request in server.asked]
    told = log.read_text()
    assert ("Z poll\n", True) == (told[19:26], f"to {tools}/out/\n" in told)
    assert b"x" * 1_000_001 == log.with_name("schedule.log.1").read_bytes()
    shown = json.loads(ask("show", "--format", "json")[1])
    assert (lines_of(tools / "tab"), []) == (shown["crontab"], shown["units"])
    assert [("lambda", "ok")] == [(one["provider"], one["state"]) for one in shown["polls"]]
    assert [("scheduled", 1, False)] == [
        (one["cursor"], one["runs"], one["cut_off"]) for one in shown["exports"]
    ]
    code, out, said = ask("show")
    assert (0, lines_of(tools / "tab")) == (code, out.splitlines()[:2])
    assert [["lambda", "ok"], ["scheduled", "1"]] == [
        [row.split()[0], row.split()[-1 if "ago" in row else 1]] for row in out.splitlines()[3::2]
    ]
    assert (True, 100) == (str(log) in said, max(100, *map(len, out.splitlines()[2:])))


def test_only_polls_and_exports_are_run_by_a_line(ask):
    """It is no way around the other commands' questions."""
    assert (2, "", True) == (
        (found := ask("run", "stop-all"))[0],
        found[1],
        "neither poll nor export" in found[2],
    )


def test_nothing_installed_and_nothing_polled_is_said(ask, tools):
    """Also where this machine has no crontab."""
    code, out, said = ask("show")
    assert (0, "", True, True) == (code, out, "Nothing is installed" in said, "Nobody was polled" in said)


def unit(name):
    found = configparser.ConfigParser(interpolation=None, strict=False)
    found.optionxform = str
    found.read(units.unit_folder() / name)
    return found


def test_timers_of_systemd_start_services_that_end(ask, tools, monkeypatch):
    """Any interval can be said; what a provider refuses is no failure of the unit."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tools}/$a 100%.db")
    export = ("--export", "s3://bucket/prices", "--as", "jsonl")
    code, _, said = ask("install", "--systemd", "--poll-every", "7m", *export)
    assert (0, True) == (code, "loginctl enable-linger" in said), said
    service, timer = unit("gpubroker-poll.service"), unit("gpubroker-poll.timer")
    gpubroker = Path(sys.executable).with_name("gpubroker")
    assert (f'"{gpubroker}" "poll"', "oneshot", "4") == tuple(
        service["Service"][key] for key in ("ExecStart", "Type", "SuccessExitStatus")
    )
    assert ("420s", "timers.target") == (timer["Timer"]["OnUnitActiveSec"], timer["Install"]["WantedBy"])
    text = (units.unit_folder() / "gpubroker-poll.service").read_text()
    assert f'Environment="GPUBROKER_DB_URL=sqlite:///{tools}/$a 100%%.db"\n' in text
    assert (
        '"--to" "s3://bucket/prices/" "--as" "jsonl"'
        in unit("gpubroker-export.service")["Service"]["ExecStart"]
    )
    assert "*-*-* 04:07:00" == unit("gpubroker-export.timer")["Timer"]["OnCalendar"]
    timers = "gpubroker-poll.timer gpubroker-export.timer"
    assert ["--user daemon-reload", f"--user enable --now {timers}"] == (
        tools / "asked"
    ).read_text().splitlines()
    if shutil.which("systemd-analyze"):
        verified = subprocess.run(
            ["systemd-analyze", "verify", "--user", "--man=no", *units.unit_folder().iterdir()],
            capture_output=True,
            text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tools)},
            check=False,
        )
        told = [line for line in verified.stderr.splitlines() if "gpubroker" in line]
        assert (0, []) == (verified.returncode, told)


def test_units_are_replaced_by_others_and_by_cron_and_removed(ask, tools):
    """Never both; a changed timer is started anew, and one that is not wanted any more is gone."""
    export = ("--export", "out", "--as", "csv")
    (tools / "tab").write_bytes(MINE)
    assert (0, 0) == (ask("install")[0], ask("install", "--systemd", *export)[0])
    assert MINE == (tools / "tab").read_bytes()
    (tools / "asked").unlink()
    assert 0 == ask("install", "--systemd", "--poll-every", "10m")[0]
    assert [
        "--user disable --now gpubroker-export.timer",
        "--user daemon-reload",
        "--user enable --now gpubroker-poll.timer",
        "--user restart gpubroker-poll.timer",
    ] == (tools / "asked").read_text().splitlines()
    names = ["gpubroker-poll.service", "gpubroker-poll.timer"]
    assert names == sorted(path.name for path in units.unit_folder().iterdir())
    shown = json.loads(ask("show", "--format", "json")[1])
    assert ([], names) == (shown["crontab"], sorted(Path(path).name for path in shown["units"]))
    assert 0 == ask("install", "--cron")[0]
    assert ([], 1) == (list(units.unit_folder().iterdir()), len(lines_of(tools / "tab")))
    (units.unit_folder() / "other.timer").touch()
    assert (0, 0) == (ask("install", "--systemd")[0], ask("remove")[0])
    assert ["other.timer"] == [path.name for path in units.unit_folder().iterdir()]


def test_what_systemctl_refuses_is_said_and_can_be_removed_all_the_same(ask, tools, monkeypatch):
    """Exit 2; without a crontab systemd is what is used."""
    (tools / "bin" / "crontab").unlink()
    monkeypatch.setenv("PATH", f"{tools / 'bin'}:{Path(sys.executable).parent}")
    monkeypatch.setattr(crontab, "is_here", lambda: False)
    (tools / "fails").touch()
    code, _, said = ask("install")
    assert (2, True) == (code, "systemctl --user daemon-reload: no bus" in said)
    assert "no crontab command here" in ask("install", "--cron")[2]
    code, _, said = ask("remove")
    assert (0, True, []) == (code, "no bus" in said, list(units.unit_folder().iterdir()))


SECONDS = st.one_of(st.integers(30, 8 * 86400), st.sampled_from([60, 300, 5400, 3600, 86400, 7 * 86400]))


@given(every_s=SECONDS)
def test_what_cron_cannot_say_is_answered_with_the_next_that_it_can(every_s):
    """Which it then takes."""
    try:
        assert 5 == len(crontab.times(every_s, "--x").split())
    except ConfigError as error:
        can = parse_duration_s(str(error).rpartition(" ")[2])
        assert can > every_s or can == 7 * 86400
        assert 5 == len(crontab.times(can, "--x").split())


TEXT = st.binary(max_size=60).filter(lambda text: b"# gpubroker: " not in text)
LINES = st.lists(st.text("abc %*\"'\\", min_size=1, max_size=9), min_size=1, max_size=3)


@given(above=TEXT, below=TEXT, lines=LINES, others=LINES)
def test_the_users_own_lines_stay_to_the_byte(above, below, lines, others):
    """Whatever they are, however often it is installed, replaced and removed."""
    first = crontab.changed(above, lines)
    assert first == crontab.changed(first, lines)
    assert lines == crontab.ours(first)
    assert others == crontab.ours(crontab.changed(first, others))
    assert first == crontab.changed(crontab.changed(first, others), lines)
    kept = crontab.changed(first, [])
    assert kept in (above, above + b"\n")
    assert (above + b"\n" == kept) == (bool(above) and not above.endswith(b"\n"))
    assert kept + below == crontab.changed(first + below, [])


@given(
    words=st.lists(
        st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=12), max_size=4
    )
)
def test_words_reach_the_program_as_they_are(words):
    """Through cron's percent signs and the shell's quotes."""
    made = crontab.line("* * * * *", {"A": "b c%"}, ["gpubroker", *words])
    assert ("* * * * *", ["env", "A=b c%", "gpubroker", *words]) == words_of(made)
    assert "%" not in made.replace("\\%", "")


def test_a_supervisor_is_told_the_same_in_its_own_words():
    """For the unit of `gpubroker service install`."""
    export = Export(place="s3://b/p/", kind="csv", cursor="nightly", every_s=86400)
    assert [
        "--poll-every", "90m", "--export", "s3://b/p/", "--as", "csv", "--cursor", "nightly",
        "--export-every", "1d",
    ] == Upkeep(poll_every_s=5400, export=export).words  # fmt: skip
    assert [] == Upkeep().words
