"""Providers are found by entry point alone: listed without importing, an outsider's on equal ground."""

import json
import os
import subprocess
import sys

import pytest

from gpubroker import provider
from gpubroker.errors import ConfigError
from tests.support import context

BUILT_IN = ["aws", "lambda", "local", "modal", "runpod", "vast"]

PLUGIN = """
from decimal import Decimal
from gpubroker.model import Offer, Parsed
from gpubroker.provider import Access

class Acme:
    name = "acme"
    def __init__(self, context):
        pass
    def access(self):
        return Access(has_credentials=True, live_without=True)
    def endpoint(self):
        return None
    def offers(self, query, deadline_s):
        offer = Offer(provider="acme", sku="h", gpu="H100", form_factor="SXM", gpu_count=1, vram_gib=80,
                      market="on_demand", preemptible=False, usd_per_hour=Decimal("0.010000"))
        return Parsed(offers=(offer,), fetched=1, source="a file")
    def check(self, deadline_s):
        return "fine"
"""


@pytest.fixture
def install(tmp_path):
    """Put a distribution with one provider on the path, as pip would."""

    def _install(dist, name, target, code=PLUGIN):
        (tmp_path / f"{target.split(':')[0]}.py").write_text(code)
        info = tmp_path / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[gpubroker.providers]\n{name} = {target}\n")

    return _install


def run(tmp_path, *args):
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    for vendor in ("VAST", "RUNPOD", "LAMBDA", "AWS_FEEDS"):
        env[f"GPUBROKER_{vendor}_URL"] = "http://127.0.0.1:9"
    command = [sys.executable, "-m", "gpubroker", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_built_in_providers_are_listed():
    """By name, without importing one."""
    assert BUILT_IN == provider.names()


def test_a_plugin_from_outside_works_by_installing_it(install, tmp_path):
    """Polled, stored and quoted like the others."""
    install("acme-gpus", "acme", "acme_plugin:Acme")
    done = run(tmp_path, "quote", "--gpu", "h100", "--hours", "8", "--format", "json")
    best = json.loads(done.stdout)["quotes"][0]
    assert (0, "acme", "0.010000", True) == (
        done.returncode, best["provider"], best["usd_per_hour"], best["live"],
    )  # fmt: skip


def test_two_distributions_with_one_name_are_refused_by_both_names(install, tmp_path):
    """Which one would be asked must not depend on the order of the path."""
    install("acme-gpus", "acme", "acme_plugin:Acme")
    install("acme-fork", "acme", "acme_fork:Acme")
    done = run(tmp_path, "providers")
    assert 2 == done.returncode
    assert "acme-fork" in done.stderr
    assert "acme-gpus" in done.stderr


def test_a_plugin_that_does_not_import_costs_only_itself(install, tmp_path):
    """Its import error is its problem, by name."""
    install("acme-gpus", "acme", "acme_plugin:Acme", code="import nothing_of_this_name")
    done = run(tmp_path, "quote", "--gpu", "h100", "--hours", "8", "--format", "json")
    problems = {p["provider"]: p["reason"] for p in json.loads(done.stdout)["problems"]}
    assert 0 == done.returncode
    assert "nothing_of_this_name" in problems["acme"]


def test_an_unknown_name_is_told_what_is_installed():
    """A typing error."""
    with pytest.raises(ConfigError, match="installed: aws, lambda"):
        provider.load("azure", context())
