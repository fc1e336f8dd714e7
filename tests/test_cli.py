"""The command line as a whole: help, laziness, exit codes, and the README telling the truth."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from gpubroker.cli import cli, main
from gpubroker.errors import BrokerError

README = (Path(__file__).parents[1] / "README.md").read_text()
HEAVY = {
    "pandas",
    "boto3",
    "botocore",
    "modal",
    "runpod",
    "vastai",
    "sqlalchemy",
    "alembic",
    "requests",
    "apscheduler",
    "apprise",
    "prometheus_client",
}


def commands(group=cli, path=()):
    """Every command with its path, imported."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands())


def imported(*args):
    """Top-level modules that a fresh process has imported after running these arguments."""
    code = (
        "import sys, gpubroker.cli as c; c.main(sys.argv[1:]);"
        "print('MODULES', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("MODULES", 1)[1].split())


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["--help"], id="help"),
        pytest.param(["quote", "--help"], id="quote's help"),
        pytest.param(["quote", "--gpu", "h100", "--hours", "8", "--offline"], id="an offline quote"),
        pytest.param(["offers", "--gpus"], id="the list of GPUs"),
        pytest.param(["schedule", "install", "--help"], id="schedule's help"),
    ],
)
def test_light_commands_import_nothing_heavy(args):
    """A person waits for each of these imports."""
    assert set() == imported(*args) & HEAVY


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_help_with_an_example(path, capsys):
    """Real ones, that start with the command itself."""
    assert 0 == main([*path, "--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    if not isinstance(ALL[path], click.Group):
        assert f"gpubroker {' '.join(path)}" in shown.split("Example", 1)[1]


def test_help_names_every_command(capsys):
    """In the order of the work."""
    main(["--help"])
    shown = capsys.readouterr().out
    assert [" ".join(p) for p in ALL if len(p) == 1] == re.findall(
        r"^  ([a-z-]+)  ", shown.split("Commands:")[1], re.M
    )


def readme_commands():
    found = re.findall(r"`(gpubroker [^`]*)`", README)
    return sorted({command for command in found if "…" not in command})


@pytest.mark.parametrize("command", readme_commands())
def test_the_readmes_commands_parse(command):
    """Every option that the README shows exists."""
    words = shlex.split(command)[1:]
    path = tuple(words[:2]) if tuple(words[:2]) in ALL else tuple(words[:1])
    options = [word for word in words[: (*words, "--").index("--")] if word.startswith("--")]
    known = {opt for p in ALL[path].params for opt in (*p.opts, *p.secondary_opts)}
    assert set() == set(options) - known


def test_the_readme_names_every_setting():
    """And no other."""
    from dataclasses import fields

    from gpubroker.config import Settings

    block = README.split("## Configuration")[1].split("```toml")[1].split("```")[0]
    shown = set(re.findall(r"^([a-z_]+) =", block.split("\n[")[0], re.M)) | {"db_url", "cache_dir"}
    shown |= set(re.findall(r"^\[([a-z]+)", block, re.M))
    assert {f.name.removesuffix("_s") for f in fields(Settings)} == shown


@pytest.mark.parametrize(
    ("error", "code"),
    [(cls, cls.exit_code) for cls in [BrokerError, *BrokerError.__subclasses__()]],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_error_has_an_exit_code_of_the_contract(error, code):
    """0 done, 2 usage or configuration, 3 nothing feasible, 4 a provider failed, 5 over budget."""
    assert code in (1, 2, 3, 4, 5)


def test_a_mistyped_command_is_told_its_near_match(capsys):
    """Exit 2."""
    assert 2 == main(["qoute", "--gpu", "h100"])
    assert "Did you mean quote?" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error():
    """gpubroker … | head -1."""
    line = f"{sys.executable} -m gpubroker offers --gpu h100 --format csv | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr)
