"""Finding and ending what bills although nobody wants it, over the vendors' own APIs on loopback."""

import json
import os
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal

import pytest
import requests
from sqlalchemy import update

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker import config
from gpubroker.cli import main
from gpubroker.doors import SystemClock
from gpubroker.model import OfferQuery
from gpubroker.prices.market import open_context
from gpubroker.provider import NodeSpec
from gpubroker.run.computes import computes
from gpubroker.run.leases import Leases
from gpubroker.run.records import Caps, Records
from gpubroker.run.renting import Order, Renting
from gpubroker.run.shell import make_key
from gpubroker.run.tables import supervisors

VENDORS = ("vast", "runpod", "lambda")
PUBLIC = make_key()[1]


@pytest.fixture
def cloud(testcloud, monkeypatch, tmp_path):
    """The environment of a user whose vendors are all on loopback."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MODAL_", "GPUBROKER_"))]:
        monkeypatch.delenv(name)
    for name, value in testcloud.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/prices.db")
    monkeypatch.setenv("GPUBROKER_DISABLED_PROVIDERS", "aws,modal,local")
    return testcloud


def rented(vendors):
    """A node of each vendor for one job."""
    with open_context(config.load(), os.environ, SystemClock()) as (store, context):
        found, _ = computes(context, vendors)
        records = Records(store.database, SystemClock())
        renting = Renting(records, found, SystemClock())
        job = records.add_job("job", "{}")
        attempts = []
        for name in vendors:
            offers = found[name].offers(OfferQuery(markets=frozenset({"on_demand"})), 30.0).offers
            for offer in sorted((o for o in offers if o.stock != "none"), key=lambda o: o.usd_per_hour):
                order = Order(
                    job_id=job,
                    offer=offer,
                    spec=NodeSpec(image="", disk_gb=10, ssh_public_key=PUBLIC),
                    usd_per_hour=offer.usd_per_hour,
                    bid_usd_per_hour=None,
                )
                attempts.append(renting.rent(order, Caps(usd_per_day=Decimal(1000))))
                break
        return attempts


def run(capsys, *words):
    code = main([*words, "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


def billing(cloud):
    return sorted(node["vendor"] for node in cloud.nodes() if node["state"] not in ("ended", "gone"))


def test_a_running_jobs_nodes_are_left_alone_and_leaked_ones_are_ended(cloud, capsys):
    """Three vendors; the attempt of one is forgotten, as a crash or a bug would."""
    attempts = rented(VENDORS)
    assert sorted(VENDORS) == billing(cloud)
    code, found = run(capsys, "sweep")
    assert (0, []) == (code, found["nodes"])
    with open_context(config.load(), os.environ, SystemClock()) as (store, _):
        Records(store.database, SystemClock()).ended(attempts[1], "forgotten")
    code, found = run(capsys, "sweep")
    assert (0, [("runpod", False)]) == (code, [(n["provider"], n["ended"]) for n in found["nodes"]])
    code, found = run(capsys, "sweep", "--end", "--yes")
    assert (0, [("runpod", True)]) == (code, [(n["provider"], n["ended"]) for n in found["nodes"]])
    assert ["lambda", "vast"] == billing(cloud)


def test_what_launches_left_in_an_account_goes_with_the_sweep_and_what_is_needed_stays(
    cloud, capsys, monkeypatch
):
    """Keys at Lambda, keys and the security group at AWS; the user's own are never touched."""
    monkeypatch.setenv("GPUBROKER_DISABLED_PROVIDERS", "vast,runpod,modal,local")
    monkeypatch.setenv("GPUBROKER_AWS_REGIONS", "us-east-1")
    attempts = rented(("aws", "lambda"))
    with account(cloud) as (ec2, lambdas):
        lambdas("POST", "/ssh-keys", {"name": "gpubroker-left", "public_key": PUBLIC})
        lambdas("POST", "/ssh-keys", {"name": "mine", "public_key": PUBLIC})
        for name in ("gpubroker-left", "mine"):
            ec2.import_key_pair(KeyName=name, PublicKeyMaterial=PUBLIC.encode())
        code, found = run(capsys, "sweep", "--end", "--yes")
        gone = [(one["provider"], one["what"]) for one in found["deleted"]]
        assert (0, [], []) == (code, found["nodes"], [p for p in found["problems"] if p["provider"] == "aws"])
        assert [("aws", "us-east-1 key pair gpubroker-left"), ("lambda", "SSH key gpubroker-left")] == gone
        assert {"mine", attempts[0].tag} == {k["KeyName"] for k in ec2.describe_key_pairs()["KeyPairs"]}
        assert {"mine", attempts[1].tag} == {k["name"] for k in lambdas("GET", "/ssh-keys")["data"]}
        assert 0 == run(capsys, "stop-all", "--yes")[0]
        code, found = run(capsys, "sweep", "--end", "--yes")
        assert ["us-east-1 security group"] == [one["what"].rpartition(" ")[0] for one in found["deleted"]]
        groups = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["gpubroker-ssh"]}])
        assert [] == groups["SecurityGroups"]
        assert ["mine"] == [k["KeyName"] for k in ec2.describe_key_pairs()["KeyPairs"]]
        assert ["mine"] == [k["name"] for k in lambdas("GET", "/ssh-keys")["data"]]


@contextmanager
def account(cloud):
    """The user's own doors to AWS and Lambda."""
    import boto3

    keys = {name.lower(): cloud.env[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    keys = {f"aws_{name}": value for name, value in keys.items()}
    ec2 = boto3.client("ec2", endpoint_url=cloud.env["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys)

    def lambdas(method, path, body=None):
        url = cloud.env["GPUBROKER_LAMBDA_URL"] + path
        headers = {"Authorization": f"Bearer {cloud.env['LAMBDA_API_KEY']}"}
        while True:  # one request a second, for everybody together
            answer = requests.request(method, url, json=body, headers=headers, timeout=10)
            if answer.status_code != 429:
                return answer.json()

    yield ec2, lambdas


def test_stop_all_ends_everything_and_its_attempts(cloud, capsys):
    """What runs, too; a second time there is nothing."""
    rented(VENDORS)
    code, found = run(capsys, "stop-all", "--yes")
    assert (0, 3) == (code, sum(node["ended"] for node in found["nodes"]))
    assert [] == billing(cloud)
    with open_context(config.load(), os.environ, SystemClock()) as (store, _):
        assert [] == Records(store.database, SystemClock()).open_attempts()
    code, found = run(capsys, "stop-all", "--yes")
    assert (0, []) == (code, found["nodes"])


def test_a_vendor_that_does_not_answer_is_told_with_exit_4(cloud, capsys, monkeypatch):
    """The others are looked at all the same."""
    monkeypatch.setenv("GPUBROKER_RUNPOD_URL", "http://127.0.0.1:9")
    code, found = run(capsys, "sweep")
    problems = {problem["provider"]: problem["reason"] for problem in found["problems"]}
    assert (4, {"aws", "modal", "local", "runpod"}) == (code, set(problems))
    assert "not looked at: disabled" in problems["aws"]
    assert problems["runpod"].startswith("runpod: ")


def test_a_provider_nobody_knows_is_exit_2(cloud, capsys):
    """One sentence."""
    assert 2 == main(["sweep", "--provider", "acme"])
    assert "no provider is called 'acme'" in capsys.readouterr().err


def test_nodes_are_ended_once_a_person_has_said_yes(cloud, capsys, monkeypatch):
    """Who is asked hears how many there are and what they bill."""
    (attempt,) = rented(["runpod"])
    with open_context(config.load(), os.environ, SystemClock()) as (store, _):
        Records(store.database, SystemClock()).ended(attempt, "forgotten")
    asked = []
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: asked.append(text) or "n")
    assert 130 == main(["sweep", "--end"])
    assert ["runpod"] == billing(cloud)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: "y")
    assert 0 == main(["sweep", "--end"])
    assert [] == billing(cloud)
    (words,) = asked
    assert words.startswith(f"End 1 node now, which bill ${attempt.usd_per_hour:.2f}/h?")


def test_nodes_of_a_submitted_job_are_its_supervisors_until_nobody_has_had_it_for_long(cloud, capsys):
    """Then their own leases are over too; what still bills is nobody's."""
    (attempt,) = rented(["runpod"])
    with open_context(config.load(), os.environ, SystemClock()) as (store, _):
        leases = Leases(store.database, SystemClock(), host="here", pid=1)
        leases.renew()
        assert Records(store.database, SystemClock()).hand_over(attempt.job_id)
        assert [attempt.job_id] == leases.claim()
        assert [] == run(capsys, "sweep")[1]["nodes"]
        leases.leave()
        assert [] == run(capsys, "sweep")[1]["nodes"]
        with store.database.write() as connection:
            connection.execute(update(supervisors).values(until_at=SystemClock().now() - timedelta(hours=1)))
    assert [attempt.node_id] == [node["node"] for node in run(capsys, "sweep")[1]["nodes"]]
