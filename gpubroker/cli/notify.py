"""`gpubroker notify`: whether the messages about unattended jobs arrive."""

from __future__ import annotations

import os

import click

from gpubroker import config
from gpubroker.cli.options import format_option
from gpubroker.cli.render import console, print_csv, print_json, table
from gpubroker.doors import Outcome, ThreadPool
from gpubroker.errors import ConfigError

_TITLE, _BODY = "gpubroker: a test", "Messages about your jobs will arrive here."


@click.group(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker notify test
  GPUBROKER_NOTIFY_URLS=ntfy://my-topic gpubroker notify test""",
)
def notify() -> None:
    """Messages about jobs that nobody watches: mail, Slack, Discord, ntfy, a webhook and others.

    Where they go stands in config.toml, as addresses of apprise (https://appriseit.com) or as variables
    that hold them; an address holds a token, and is never shown:

    \b
        [notify]
        urls = ["$SLACK_URL", "ntfy://my-topic"]
        events = ["done", "failed", "budget"]    # left out: all but the everyday ones
    """


@notify.command(epilog="Example: gpubroker notify test")
@format_option("table", "json", "csv")
def test(*, output: str) -> None:
    """Send a message to each channel. Exit code 4 when one of them did not take it."""
    from gpubroker.run.notify import SEND_S, Channel, by_apprise, channels_of, check, kinds_of

    settings = config.load()
    channels = channels_of(settings, os.environ)
    kinds_of(settings)
    if not channels:
        where = config.config_path(os.environ)
        raise ConfigError(f'nobody is to be told: set [notify] urls = ["$SLACK_URL"] in {where}')
    check(channels)

    def deliver(channel: Channel) -> bool:
        return by_apprise(channel.urls, _TITLE, _BODY)

    def state(outcome: Outcome[Channel, bool]) -> str:
        return "sent" if outcome.value else "no answer in time" if outcome.late else "not sent"

    outcomes = ThreadPool().map(deliver, channels, SEND_S)
    rows = [(outcome.item.name, state(outcome)) for outcome in outcomes]
    if output == "json":
        print_json({"channels": [{"channel": name, "state": told} for name, told in rows]})
    elif output == "csv":
        print_csv(("channel", "state"), rows)
    else:
        made = table("channel", "state")
        for row in rows:
            made.add_row(*row)
        console().print(made)
    if any(told != "sent" for _, told in rows):
        raise click.exceptions.Exit(4)
