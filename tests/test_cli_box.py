"""A box of one's own over the vendors' APIs on loopback: real processes behind real SSH, or Modal's exec."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker.cli import main, watching
from gpubroker.run.contact import keys_of
from gpubroker.testcloud.client import running
from tests.support import PATIENCE_S

PORT_OF_A_BOX = 8321


@pytest.fixture(scope="module")
def cloud():
    """One for all tests here; each rents what it needs."""
    with running(speed=10) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def home(cloud, tmp_path_factory):
    """The environment of one user, for processes and for this one."""
    folder = tmp_path_factory.mktemp("user")
    kinds = {f"XDG_{kind}_HOME": str(folder / kind) for kind in ("DATA", "CACHE", "CONFIG")}
    return {**cloud.env, **kinds, "HOME": str(folder), "GPUBROKER_DB_URL": f"sqlite:///{folder}/p.db"}


@pytest.fixture
def user(home, monkeypatch):
    """This process is the user's."""
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(watching, "_STARTING_S", 0.3)


@pytest.fixture
def call(user, capfdbinary):
    """`call(words)` is a command: its exit code, what it printed, what it said."""

    def _call(*words):
        capfdbinary.readouterr()
        code = main(list(words))
        return code, *(stream.decode() for stream in capfdbinary.readouterr())

    return _call


@pytest.fixture(scope="module")
def lab(cloud, home):
    """A box at vast, as `up --format json` tells it."""
    words = ["up", "--gpu", "4090", "--hours", "2", "--provider", "vast", "--name", "lab"]
    words += ["--port", str(PORT_OF_A_BOX), "--format", "json"]
    return json.loads(started(home, *words).communicate(timeout=120)[0])


def started(home, *words, **more):
    """A process of its own."""
    env = {**{k: os.environ[k] for k in ("PATH", "LANG") if k in os.environ}, **home}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "gpubroker", *words], env=env, **{**pipes, **more})


def up(call, vendor, *words):
    """Its record."""
    code, out, said = call(
        "up",
        "--min-vram",
        "16",
        "--hours",
        "1",
        "--provider",
        vendor,
        "--name",
        vendor,
        "--format",
        "json",
        *words,
    )
    assert 0 == code, said
    return json.loads(out)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def state_of(cloud, record):
    (node,) = cloud.nodes(id=record["node"])
    return node["state"]


def test_a_box_is_up_and_says_what_it_costs_and_when_it_ends(call, cloud, lab):
    """Two hours from when it began to bill; it holds its own lease, which nobody renews."""
    assert ("vast", "on_demand", True, "running") == (
        lab["provider"],
        lab["market"],
        lab["ends_itself"],
        state_of(cloud, lab),
    )
    assert (lab["since"][:10], 2) != (lab["stops_at"], 0)
    code, out, _ = call("boxes", "--format", "json")
    (listed,) = [box for box in json.loads(out)["boxes"] if box["name"] == "lab"]
    assert (0, lab["id"], "running") == (code, listed["id"], listed["state"])
    code, out, _ = call("exec", "lab", "--", f"cat gpubroker/{lab['id']}/config.json")
    config = json.loads(out)
    assert (7200.0, None, "end") == (config["max_s"], config["renew_within_s"], config["after"])


def test_exec_gives_output_errors_and_the_exit_status(call, lab):
    """As if the command ran here."""
    assert (7, "out\n", "bad\n") == call("exec", "lab", "--", "echo out; echo bad >&2; exit 7")


def test_exec_takes_several_words_for_one_command_and_one_for_a_line(call, lab):
    """Nothing that a word holds is split, or read by the shell there."""
    assert (0, "a  b $HOME ;\n") == call("exec", "lab", "--", "echo", "a  b", "$HOME", ";")[:2]
    assert (0, "2\n") == call("exec", "lab", "--", "printf 'x\\ny\\n' | wc -l")[:2]


def test_a_command_that_a_signal_ends_is_128_and_its_number(call, lab):
    """As a shell has it."""
    assert 128 + signal.SIGKILL == call("exec", "lab", "--", "kill -9 $$")[0]


def test_exec_passes_standard_input_on_where_it_is_asked_to(home, lab):
    """To its end."""
    process = started(home, "exec", "lab", "--stdin", "--", "cat; echo end", stdin=subprocess.PIPE)
    assert "given\nend\n" == process.communicate("given\n", timeout=60)[0]


def test_the_output_of_exec_comes_while_the_command_runs(home, lab):
    """It is not kept back to the end."""
    with started(home, "exec", "lab", "--", "echo now; read never") as process:
        assert "now\n" == process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert 130 == process.wait(PATIENCE_S)


def test_files_and_folders_go_to_a_box_and_come_back(call, lab, tmp_path, monkeypatch):
    """Into what is a folder, as what is not there yet; names with spaces; the name of the box left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "sub d").mkdir(parents=True)
    (tmp_path / "data" / "sub d" / "it's").write_bytes(bytes(range(256)))
    (tmp_path / "one.txt").write_text("one")
    for words in (("one.txt", "lab:"), ("one.txt", ":two.txt"), ("data", ":"), ("data", "lab:deep/er/")):
        assert (0, "", "") == call("cp", *words)
    found = call("exec", "lab", "--", "cat one.txt two.txt; ls deep/er/data data")[1]
    assert "oneonedata:\nsub d\n\ndeep/er/data:\nsub d\n" == found
    for words in ((":two.txt", "three.txt"), (":one.txt", "new/"), ("lab:data", "got"), ("lab:data", "got")):
        assert (0, "", "") == call("cp", *words)
    assert ("one", "one") == ((tmp_path / "three.txt").read_text(), (tmp_path / "new/one.txt").read_text())
    for place in ("got", "got/data"):
        assert bytes(range(256)) == (tmp_path / place / "sub d" / "it's").read_bytes()


def test_cp_says_what_is_not_there_and_which_side_is_which(call, lab, tmp_path, monkeypatch):
    """One sentence, exit 2; nothing half-copied stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").write_text("")
    for words, sentence in (
        (("lab:nothing", "."), "nothing: there is no such file or folder on the box"),
        (("nothing", "lab:"), "nothing: there is no such file or folder here"),
        (("here", "there"), "one side must be on a box"),
        (("lab:a", "lab:b"), "one side must be on a box"),
        (("./a:b", "nobody:"), "no box is called 'nobody'"),
    ):
        code, _, said = call("cp", *words)
        assert (2, True) == (code, sentence in said), said
    assert ["a:b"] == [path.name for path in tmp_path.iterdir()]


def test_a_server_on_the_box_is_reached_by_a_port_here(call, home, lab):
    """A web server there on one port, forwarded to another one here, until Ctrl-C."""
    serve = "python3 -u -m http.server 0 --bind 127.0.0.1 --directory site >serve.log 2>&1"
    call(
        "exec", "lab", "--", f"mkdir -p site && echo hello >site/index.html; {serve} & sleep 1; cat serve.log"
    )
    there = call("exec", "lab", "--", "sed -n 's/.* port \\([0-9]*\\) .*/\\1/p' serve.log")[1].strip()
    here = free_port()
    with started(home, "forward", "lab", f"{there}:{here}") as process:
        assert f"http://127.0.0.1:{here} is port {there} of lab\n" == process.stderr.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{here}/", timeout=20) as answer:
            assert b"hello\n" == answer.read()
        process.send_signal(signal.SIGINT)
        assert 0 == process.wait(PATIENCE_S)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{here}/", timeout=20)


def test_forward_without_a_port_takes_those_of_up_and_refuses_what_is_taken(call, home, lab):
    """--port 8321 of `up`; here somebody else listens there."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", PORT_OF_A_BOX))
        taken.listen()
        code, _, said = call("forward", "lab")
        assert (4, True) == (code, f"local port {PORT_OF_A_BOX}" in said)
    assert 2 == call("forward", "lab", "70000")[0]
    assert 2 == call("forward", "lab", "x")[0]


def test_ssh_is_the_systems_own_with_the_boxs_key_and_host_key_alone(home, lab, tmp_path):
    """What it is started with: nothing of the user's configuration, agent or known hosts."""
    fake = tmp_path / "bin" / "ssh"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >{tmp_path}/argv\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    process = started({**home, "PATH": path}, "ssh", "lab", "--", "echo", "a b")
    assert (0, "", "") == (process.wait(60), *process.communicate())
    words = (tmp_path / "argv").read_text().splitlines()
    folder = Path(home["XDG_DATA_HOME"], "gpubroker", "jobs", lab["id"])
    assert ["-F", "/dev/null", "-i", str(folder / "key")] == words[:4]
    assert ["root@127.0.0.1", "echo 'a b'"] == words[-2:]
    options = {word for flag, word in pairwise(words) if flag == "-o"}
    assert {
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        "ForwardAgent=no",
        "StrictHostKeyChecking=yes",
        f'UserKnownHostsFile="{folder}/known_hosts"',
        "GlobalKnownHostsFile=/dev/null",
    } <= options
    assert {0o600} == {(folder / name).stat().st_mode & 0o777 for name in ("key", "known_hosts")}


@pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh client is installed here")
def test_openssh_is_let_in_and_finds_the_host_key_it_was_told(home, lab):
    """The exit status is the command's."""
    process = started(home, "ssh", "lab", "--", 'echo over ssh; test -n "$SSH_CONNECTION" && exit 5')
    assert ("over ssh\n", "") == process.communicate(timeout=60)
    assert 5 == process.returncode


def test_without_an_ssh_client_the_sentence_says_what_else_works(call, lab, monkeypatch):
    """Exit 2."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, _, said = call("ssh", "lab")
    assert (2, True) == (code, "gpubroker exec lab -- COMMAND" in said)


def test_a_box_with_another_host_key_than_at_first_contact_is_refused(call, home, lab):
    """By exec and by ssh: it is not the same node."""
    keys = keys_of(Path(home["XDG_DATA_HOME"], "gpubroker", "jobs", lab["id"]))
    tag, kept = keys.known_hosts.read_text().split(" ", 1)
    other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHEahHPvwKeEfL0YOfnBl61JOoz2pOiKFcnjYdnYf6YX\n"
    keys.known_hosts.write_text(f"{tag} {other}")
    try:
        code, _, said = call("exec", "lab", "--", "true")
    finally:
        keys.known_hosts.write_text(f"{tag} {kept}")
    assert (4, True) == (code, "another host key than at first contact" in said)


@pytest.mark.parametrize("vendor", ["runpod", "aws"])
def test_down_ends_a_box_and_the_ledger_has_its_cost(call, cloud, home, vendor):
    """The key and the port are the vendor's own way; what is forwarded breaks off with exit 4."""
    box = up(call, vendor)
    assert (0, "there\n") == call("exec", vendor, "--", "echo there")[:2]
    forwarding = started(home, "forward", vendor, f"8888:{free_port()}")
    assert "is port 8888" in forwarding.stderr.readline()
    code, out, said = call("down", vendor, "--format", "json")
    record = json.loads(out)
    assert (0, "ended", "done") == (code, state_of(cloud, box), record["state"])
    assert f"{vendor} has ended; it cost about $" in said
    assert "the connection was lost" in forwarding.communicate(timeout=60)[1]
    assert 4 == forwarding.returncode
    (attempt,) = [a for a in record["attempts"] if a["node"] == box["node"]]
    assert (True, "down") == (Decimal(attempt["usd_estimated"]) > 0, attempt["end_reason"])
    shown = json.loads(call("job", "show", box["id"], "--format", "json")[1])
    assert record == shown
    code, _, said = call("down", vendor)
    assert (2, True) == (code, f"no box is called '{vendor}'" in said or "no box is up" in said)


def test_on_modal_exec_cp_and_down_work_and_ssh_says_what_does(call, cloud, tmp_path, monkeypatch):
    """There is no SSH; its sandbox's own timeout ends it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a").write_text("a")
    box = up(call, "modal")
    assert (3, "out\n", "bad\n") == call("exec", "modal", "--", "echo out; echo bad >&2; exit 3")
    assert 0 == call("cp", "work", "modal:")[0]
    assert 0 == call("cp", "modal:work/a", "back")[0]
    assert "a" == (tmp_path / "back").read_text()
    for words in (("ssh", "modal"), ("forward", "modal", "8888")):
        code, _, said = call(*words)
        assert (2, True) == (code, "modal gives no SSH" in said)
    assert (0, "ended") == (call("down", "modal")[0], state_of(cloud, box))


def test_a_box_that_cannot_end_itself_says_so_and_sweep_finds_it_when_its_time_is_over(call, cloud, home):
    """Lambda lets no node end itself."""
    code, out, _ = call("up", "--min-vram", "16", "--hours", "1", "--provider", "lambda", "--name", "l")
    assert (0, True) == (code, "IT CANNOT END ITSELF" in out)
    (box,) = [b for b in json.loads(call("boxes", "--format", "json")[1])["boxes"] if b["name"] == "l"]
    assert False is box["ends_itself"]
    assert [] == json.loads(call("sweep", "--format", "json")[1])["nodes"]
    move_its_end_to_the_past(home, box["id"])
    assert "OVER, still bills" in call("boxes")[1]
    code, out, _ = call("sweep", "--format", "json")
    assert (0, [(box["node"], False)]) == (code, [(n["node"], n["ended"]) for n in json.loads(out)["nodes"]])
    code, out, _ = call("sweep", "--end", "--yes", "--format", "json")
    assert (0, [(box["node"], True)]) == (code, [(n["node"], n["ended"]) for n in json.loads(out)["nodes"]])
    assert "ended" == state_of(cloud, box)
    assert "done" == json.loads(call("job", "show", box["id"], "--format", "json")[1])["state"]


def move_its_end_to_the_past(home, job_id):
    """As if it had been up for longer than it may."""
    import sqlite3

    with sqlite3.connect(home["GPUBROKER_DB_URL"].removeprefix("sqlite:///")) as database:
        (spec,) = database.execute("SELECT spec FROM jobs WHERE id = ?", (job_id,)).fetchone()
        told = json.loads(spec)
        told["limits"]["max_hours"] = told["work"]["hours"] = "0.0001"
        database.execute("UPDATE jobs SET spec = ? WHERE id = ?", (json.dumps(told), job_id))
    database.close()


def test_a_box_ends_itself_when_its_hours_are_over(tmp_path, home):
    """Nobody is there: its vendor has no node any more, and the records say so when somebody looks."""

    def told(*words):
        process = started(own, *words, "--format", "json")
        out, said = process.communicate(timeout=240)
        assert 0 == process.returncode, said
        return json.loads(out)

    with running(speed=1) as cloud:
        own = {
            **home,
            **cloud.env,
            "GPUBROKER_AWS_REGIONS": "us-east-1",
            "GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/p.db",
        }
        box = told("up", "--gpu", "t4", "--hours", "0.018", "--provider", "modal")
        cloud.wait_for(id=box["node"], state="ended", within_s=120)
        assert [] == told("boxes")["boxes"]
        record = told("job", "show", box["id"])
    (attempt,) = record["attempts"]
    assert "done" == record["state"]
    assert attempt["end_reason"] in ("its time was over", "gone before its time")  # created before it bills
    assert attempt["ended"] <= box["stops_at"]


def test_past_the_cap_of_the_day_nothing_is_rented(call, cloud, monkeypatch):
    """Exit 5, with the limit and what was wanted."""
    before = len(cloud.nodes())
    monkeypatch.setenv("GPUBROKER_USD_PER_DAY", "0.01")
    code, _, said = call("up", "--gpu", "4090", "--hours", "1", "--provider", "runpod", "--name", "dear")
    assert (5, True, before) == (code, "the limit of today is $0.01" in said, len(cloud.nodes()))
    monkeypatch.setenv("GPUBROKER_USD_PER_DAY", "100")
    code, _, said = call("up", "--gpu", "4090", "--hours", "1", "--max-usd", "0.01", "--name", "dear")
    assert (5, True, before) == (code, "the limit of this job is $0.01" in said, len(cloud.nodes()))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("up", "--hours", "1"), "say which GPU", id="no GPU"),
        pytest.param(("up", "--gpu", "4090"), "Missing option '--hours'", id="no hours"),
        pytest.param(("up", "--gpu", "4090", "--hours", "0"), "0 is not above 0", id="no time"),
        pytest.param(("up", "--gpu", "4090", "--hours", "nan"), "not a finite number", id="nan"),
        pytest.param(("up", "--gpu", "4090", "--hours", "1", "--name", "A b"), "name: ", id="odd name"),
        pytest.param(
            ("up", "--gpu", "4090", "--hours", "1", "--name", "lab"), "lab is up already", id="taken"
        ),
        pytest.param(
            ("up", "--gpu", "t4", "--hours", "30", "--provider", "modal"),
            "ends every node sooner",
            id="too long",
        ),
        pytest.param(("exec", "lab"), "say what to run after --", id="no command"),
        pytest.param(("exec", "lab", "nvidia-smi"), "put -- before the command", id="no dashes"),
        pytest.param(("exec", "nobody", "--", "true"), "no box is called 'nobody'", id="unknown"),
        pytest.param(("ssh", "nobody"), "no box is called 'nobody'", id="ssh unknown"),
        pytest.param(("down", "nobody"), "no box is called 'nobody'", id="down unknown"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_sentence(call, lab, words, sentence):
    """Exit 2."""
    code, _, said = call(*words)
    assert (2, True) == (code, sentence in said), said


def test_with_no_box_up_the_sentence_says_how_to_get_one(monkeypatch, tmp_path, capsys):
    """For every command that needs one."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")
    for words in (["ssh"], ["exec", "--", "true"], ["cp", ":a", "."], ["forward", "8888"], ["down"]):
        assert 2 == main(words)
        assert "no box is up: gpubroker up" in capsys.readouterr().err


def test_a_box_is_no_job_to_run_or_to_resume(call, lab, tmp_path):
    """`run` would go on renting one after the other."""
    code, _, said = call("run", "--resume", lab["id"])
    assert (2, True) == (code, f"{lab['id']} is a box" in said)
    file = tmp_path / "job.toml"
    file.write_text(
        'box = true\ncommand = "x"\n[gpu]\nname = "4090"\n[work]\nhours = 1\n[limits]\nmax_hours = 1\n'
    )
    code, _, said = call("run", str(file))
    assert (2, True) == (code, "gpubroker up rents boxes" in said)


def test_an_interrupted_up_leaves_nothing_that_bills(home, cloud):
    """Ctrl-C while it is being prepared."""
    with started(home, "up", "--gpu", "a100", "--hours", "1", "--name", "not-yet") as process:
        for line in process.stderr:
            if "] renting " in line:
                break
        node = line.split()[-1]
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert 130 == process.wait(60)
    assert ["ended"] == [n["state"] for n in cloud.nodes(id=node)]
