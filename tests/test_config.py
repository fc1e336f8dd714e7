"""Settings: defaults, file, environment, and errors that name the place."""

from decimal import Decimal
from pathlib import Path

import pytest

from gpubroker.config import DayCaps, LocalGpu, Notify, load
from gpubroker.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    """Write a config.toml and return the environment that points at it."""

    def _write(text):
        path = tmp_path / "config.toml"
        path.write_text(text)
        return {"GPUBROKER_CONFIG": str(path)}

    return _write


def test_defaults_need_neither_file_nor_environment():
    """A newcomer has neither."""
    settings = load({})
    assert 1800 == settings.max_age_s
    assert settings.db_url.startswith("sqlite:///")
    assert {} == settings.fees


def test_every_key_of_the_file_is_taken(write):
    """The README's example."""
    settings = load(
        write("""
            max_age = "45m"
            local_usd_per_kwh = 0.28
            local_gpus = [{ gpu = "rtx4090", count = 2, watts = 400 }, "h100-sxm"]
            aws_regions = ["us-east-1"]
            disabled_providers = ["modal"]
            egress_gb_this_month = 120
            node_hours_per_day = 48
                        [notify]
            urls = ["$SLACK_URL", "mailto://me:word@example.com?to=a,b"]
            events = ["done", "failed"]
            [accounts.vast]
            usd_per_day = 50
            node_hours_per_day = 0
            [fees.runpod]
            egress_usd_per_gb = "0.05"
        """)
    )
    assert 2700 == settings.max_age_s
    assert Decimal("0.28") == settings.local_usd_per_kwh
    assert (LocalGpu(gpu="rtx4090", count=2, watts=400), LocalGpu(gpu="h100-sxm")) == settings.local_gpus
    assert ("us-east-1",) == settings.aws_regions
    assert frozenset({"modal"}) == settings.disabled_providers
    assert {("runpod", "egress_usd_per_gb"): Decimal("0.05")} == settings.fees
    urls = ("$SLACK_URL", "mailto://me:word@example.com?to=a,b")
    assert Notify(urls=urls, events=("done", "failed")) == settings.notify
    assert (Decimal(48), {"vast": DayCaps(usd_per_day=Decimal(50))}) == (
        settings.node_hours_per_day,
        settings.accounts,
    )


def test_the_environment_wins_over_the_file(write):
    """Every key also as GPUBROKER_…"""
    env = write('max_age = "45m"') | {
        "GPUBROKER_MAX_AGE": "10s",
        "GPUBROKER_DISABLED_PROVIDERS": "aws, modal",
        "GPUBROKER_LOCAL_GPUS": "rtx3090, h100-pcie:2:300",
        "GPUBROKER_FEES_RUNPOD_EGRESS_USD_PER_GB": "0.1",
        "GPUBROKER_NOTIFY_URLS": "mailto://me:word@example.com?to=a,b, $SLACK_URL ntfy://topic",
        "GPUBROKER_NOTIFY_EVENTS": "done, failed",
        "GPUBROKER_NODE_HOURS_PER_DAY": "24",
        "GPUBROKER_ACCOUNTS_LAMBDA_USD_PER_DAY": "5",
        "GPUBROKER_ACCOUNTS_LAMBDA_NODE_HOURS_PER_DAY": "0.5",
    }
    settings = load(env)
    assert 10 == settings.max_age_s
    assert frozenset({"aws", "modal"}) == settings.disabled_providers
    assert (LocalGpu(gpu="rtx3090"), LocalGpu(gpu="h100-pcie", count=2, watts=300)) == settings.local_gpus
    assert {("runpod", "egress_usd_per_gb"): Decimal("0.1")} == settings.fees
    urls = ("mailto://me:word@example.com?to=a,b", "$SLACK_URL", "ntfy://topic")
    assert Notify(urls=urls, events=("done", "failed")) == settings.notify
    caps = DayCaps(usd_per_day=Decimal(5), node_hours_per_day=Decimal("0.5"))
    assert (Decimal(24), {"lambda": caps}) == (settings.node_hours_per_day, settings.accounts)


def test_where_the_ssh_of_a_vendors_nodes_is_is_no_setting_and_no_mistake():
    """A test cloud says so where port 22 is not its own."""
    assert load({}) == load({"GPUBROKER_AWS_SSH_PORT": "2222", "GPUBROKER_LAMBDA_SSH_PORT": "2222"})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        pytest.param("max_age = 30", "not a duration", id="a number without a unit"),
        pytest.param("max_agee = '30m'", "unknown key 'max_agee'", id="a misspelt key"),
        pytest.param("local_usd_per_kwh = 'cheap'", "not a number", id="words for a number"),
        pytest.param("local_usd_per_kwh = nan", "zero or more", id="NaN"),
        pytest.param("local_usd_per_kwh = -1", "zero or more", id="negative"),
        pytest.param("local_gpus = [{ count = 2 }]", "gpu", id="a GPU without its name"),
        pytest.param("local_gpus = [{ gpu = 'h100', count = 0 }]", "1 or more", id="no GPUs"),
        pytest.param("local_gpus = ['rtx9999']", "no GPU is called", id="an unknown GPU"),
        pytest.param("local_gpus = ['a100-80gb']", "is 2 cards; say which", id="a GPU in two forms"),
        pytest.param("local_gpus = ['rtx4090:two']", "name:count", id="a short form that is none"),
        pytest.param("db_url = 'sqlite://'", "names no file", id="a database in memory"),
        pytest.param("fees = 3", "tables", id="fees that are no table"),
        pytest.param("cpu_cores_per_gpu = '1e30'", "beyond belief", id="cores beyond belief"),
        pytest.param("[fees.aws]\negress_usd_per_gb = '1e30'", "beyond belief", id="a fee beyond belief"),
        pytest.param("accounts = 3", "tables", id="accounts that are no table"),
        pytest.param(
            "[accounts.vast]\nusd = 3", "accounts.vast: unknown key 'usd'", id="an account's unknown cap"
        ),
        pytest.param("[accounts.vast]\nusd_per_day = -3", "zero or more", id="an account's negative cap"),
        pytest.param("node_hours_per_day = 'all'", "not a number", id="hours in words"),
        pytest.param("a = " + "[" * 5000, "config.toml", id="nested beyond sense"),
        pytest.param("[", "config.toml", id="not TOML"),
        pytest.param("notify = 3", "notify must be a table", id="notify that is no table"),
        pytest.param("[notify]\nurl = []", "unknown key 'notify.url'", id="a misspelt key of notify"),
        pytest.param("notify_urls = []", "unknown key 'notify_urls'", id="a key of notify outside of it"),
        pytest.param("[notify]\nurls = 3", "must be a list of addresses", id="a number for addresses"),
        pytest.param("[notify]\nurls = ['$A', 'b']", "number 2 is no address", id="no address"),
        pytest.param("[notify]\nevents = [1]", "list of names", id="numbers for events"),
        pytest.param("aws_regions = [1]", "list of names", id="numbers for names"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_the_place(write, text, word):
    """Exit code 2, no traceback."""
    with pytest.raises(ConfigError, match=word) as caught:
        load(write(text))
    assert "config.toml" in str(caught.value)
    assert 2 == caught.value.exit_code


def test_an_address_for_notifications_is_in_no_error_and_no_print(write):
    """It may hold a token."""
    with pytest.raises(ConfigError) as caught:
        load(write("[notify]\nurls = ['t0ken-without-its-kind']"))
    settings = load(write("[notify]\nurls = ['slack://t0ken/t0ken/t0ken']"))
    assert "t0ken" not in f"{caught.value} {settings}"


def test_a_variable_that_does_not_exist_is_refused():
    """A misspelt GPUBROKER_… must not be silently ignored; base URLs and test switches pass."""
    with pytest.raises(ConfigError, match="GPUBROKER_MAXAGE"):
        load({"GPUBROKER_MAXAGE": "1h"})
    with pytest.raises(ConfigError, match="GPUBROKER_ACCOUNTS_VAST_HOURS"):
        load({"GPUBROKER_ACCOUNTS_VAST_HOURS": "1"})
    load({"GPUBROKER_VAST_URL": "http://127.0.0.1:1", "GPUBROKER_RUNPOD_S3_URL": "http://127.0.0.1:1"})


def test_the_jobs_folder_is_the_users_own_unless_it_is_said(tmp_path, monkeypatch):
    """Whatever the folder in which a command is typed."""
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.chdir(tmp_path)
    assert Path("/data/gpubroker/jobs") == load({}).jobs_dir
    assert tmp_path / "jobs" == load({"GPUBROKER_JOBS_DIR": "jobs"}).jobs_dir
