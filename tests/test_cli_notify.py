"""`gpubroker notify test`: a message to each channel, and which of them took it."""

import json

import pytest

from gpubroker.cli import main
from gpubroker.testing import Answer
from tests.loopback import vendor


@pytest.fixture
def configure(monkeypatch, tmp_path):
    """Write a config.toml and have it used."""

    def _configure(text):
        path = tmp_path / "config.toml"
        path.write_text(text)
        monkeypatch.setenv("GPUBROKER_CONFIG", str(path))
        return path

    return _configure


def notify_test(capsys, *args):
    code = main(["notify", "test", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_every_channel_gets_a_message(configure, capsys, monkeypatch):
    """One by its address, one by the variable that holds it; JSON on standard output alone."""
    with vendor({("POST", path): Answer() for path in ("/a", "/b")}) as server:
        url = server.url.replace("http", "json")
        configure(f'[notify]\nurls = ["{url}/a", "$CHAT_URL"]')
        monkeypatch.setenv("CHAT_URL", f"{url}/b")
        code, out, err = notify_test(capsys, "--format", "json")
        assert {"/a", "/b"} == {request.path for request in server.asked}
        assert {"gpubroker: a test"} == {request.json()["title"] for request in server.asked}
    assert (0, "") == (code, err)
    channels = [{"channel": "json://…", "state": "sent"}, {"channel": "$CHAT_URL", "state": "sent"}]
    assert {"channels": channels} == json.loads(out)


def test_a_channel_that_does_not_work_is_named_and_exit_4(configure, capsys):
    """The other gets its message all the same; no address is shown."""
    answers = {("POST", "/good5ecret"): Answer(), ("POST", "/bad5ecret"): Answer(status=403)}
    with vendor(answers) as server:
        url = server.url.replace("http", "json")
        configure(f'[notify]\nurls = ["{url}/good5ecret", "{url}/bad5ecret"]')
        code, out, err = notify_test(capsys, "--format", "csv")
    assert (4, "channel,state\njson://…,sent\njson://… (2),not sent\n", "") == (code, out, err)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", "nobody is to be told: set [notify] urls", id="no channel"),
        pytest.param(
            '[notify]\nurls = ["$CHAT_URL"]', "CHAT_URL is not set", id="a variable that is not set"
        ),
        pytest.param(
            '[notify]\nurls = ["slak://t0ken/x"]', "no such address: slak://…", id="an unknown kind"
        ),
        pytest.param(
            '[notify]\nurls = ["json://x"]\nevents = ["finished"]',
            "'finished' is none of",
            id="an unknown event",
        ),
    ],
)
def test_what_is_set_wrong_is_one_sentence_and_exit_2(configure, capsys, text, expected):
    """Before anything is sent."""
    configure(text)
    code, out, err = notify_test(capsys)
    assert (2, "", 1) == (code, out, err.count("\n"))
    assert expected in err
    assert "t0ken" not in err
