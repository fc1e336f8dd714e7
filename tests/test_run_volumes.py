"""Which volume is meant, which offers can mount it, and what the agent is told."""

from dataclasses import replace
from decimal import Decimal

import pytest

from gpubroker.errors import ConfigError, Transient
from gpubroker.jobspec import job_from
from gpubroker.node import store
from gpubroker.node.config import BadConfig, open_store
from gpubroker.plan.fees import FeeTable
from gpubroker.provider import VolumeRules, VolumeView
from gpubroker.run.volumes import Volume, at_volume, find, list_all, store_on, used_by
from tests.checkpoint_support import a_checkpoint, publish
from tests.support import NOW
from tests.test_runpod_nodes import OFFER

RULES = VolumeRules(has_region=True, sizes_gb=(10, 4096), cloud="secure")
VIEW = VolumeView(id="vol1", name="gpubroker-data", region="EU-RO-1", size_gb=Decimal(100))
VOLUME = Volume(provider="runpod", view=VIEW, rules=RULES)
SECURE = replace(OFFER, cloud="secure", details={"data_centers": "CA-MTL-1,EU-RO-1"})


class Maker:
    """A vendor with these volumes, or one that is away."""

    volume_rules = RULES

    def __init__(self, *views):
        self._views = views

    def list_volumes(self, deadline_s):
        if None in self._views:
            raise Transient("runpod", "list volumes", "away")
        return list(self._views)


@pytest.mark.parametrize(
    ("offer", "expected"),
    [
        pytest.param(SECURE, replace(SECURE, region="EU-RO-1"), id="one of its data centers"),
        pytest.param(replace(SECURE, region="EU-RO-1"), replace(SECURE, region="EU-RO-1"), id="there"),
        pytest.param(
            replace(SECURE, region="EU-RO-10"), "another region: volume data is in EU-RO-1", id="elsewhere"
        ),
        pytest.param(
            replace(SECURE, details={"data_centers": "EU-RO-10"}),
            "another region: volume data is in EU-RO-1",
            id="a data center of nearly its name",
        ),
        pytest.param(
            replace(SECURE, details={}), "another region: volume data is in EU-RO-1", id="nobody knows where"
        ),
        pytest.param(
            replace(SECURE, cloud="community"), "the community cloud mounts no volumes", id="community"
        ),
        pytest.param(
            replace(SECURE, provider="vast"),
            "another provider: volume data is at runpod in EU-RO-1",
            id="another vendor",
        ),
    ],
)
def test_an_offer_is_pinned_to_where_the_volume_is_or_says_why_not(offer, expected):
    """A price for several data centers is rented in the volume's."""
    assert expected == at_volume(offer, VOLUME)


def test_a_volume_without_a_region_is_mounted_by_every_offer_of_its_vendor():
    """Modal's."""
    anywhere = Volume(
        provider="runpod",
        view=VolumeView(id="v", name="gpubroker-v"),
        rules=VolumeRules(has_region=False, sizes_gb=None),
    )
    for offer in (OFFER, replace(OFFER, region="us")):
        assert offer == at_volume(offer, anywhere)


def test_the_one_of_that_name_is_found_by_its_short_name():
    """Among all vendors that answer."""
    other = replace(VIEW, name="gpubroker-other")
    assert VOLUME == find("data", {"runpod": Maker(VIEW, other), "lambda": Maker(other)})


def test_none_or_several_are_one_sentence():
    """With what to do about it, and who did not answer."""
    with pytest.raises(ConfigError, match="no volume is called data at lambda, runpod; gpubroker volume ls"):
        find("data", {"runpod": Maker(), "lambda": Maker()})
    with pytest.raises(ConfigError, match=r"lists them; runpod: list volumes: away"):
        find("data", {"runpod": Maker(None)})
    with pytest.raises(ConfigError, match="no provider with volumes has an account"):
        find("data", {})
    with pytest.raises(ConfigError, match="at lambda in EU-RO-1 and runpod in EU-RO-1: say which"):
        find("data", {"runpod": Maker(VIEW), "lambda": Maker(VIEW)})
    with pytest.raises(ConfigError, match="2 volumes are called data at runpod: rename one"):
        find("data", {"runpod": Maker(VIEW, replace(VIEW, id="vol2"))})


def test_a_vendor_that_does_not_answer_costs_only_itself():
    """The others' volumes are listed."""
    found, problems = list_all({"runpod": Maker(VIEW), "lambda": Maker(None)})
    assert ([VOLUME], {"lambda": "runpod: list volumes: away"}) == (found, problems)


def test_a_month_costs_by_the_vendors_word_before_the_tables():
    """Unknown where the size is."""
    fees = FeeTable.load()
    own = replace(VOLUME, view=replace(VIEW, usd_per_gb_month=Decimal("0.10")))
    unknown = replace(VOLUME, view=replace(VIEW, size_gb=None))
    assert Decimal("7.000000") == VOLUME.usd_per_month(fees).usd
    assert Decimal("10.000000") == own.usd_per_month(fees).usd
    assert unknown.usd_per_month(fees) is None
    large = replace(VOLUME, view=replace(VIEW, size_gb=Decimal(1500)))
    assert Decimal("95.000000") == large.usd_per_month(fees).usd


def test_the_agents_store_is_the_mounted_folder_and_needs_no_key():
    """Home-relative: the vendor's absolute path is below the home of the user that commands run as."""
    keys = store_on(VOLUME)
    assert ("volume:data", "vol1", "~/volume", "") == (
        keys.where,
        keys.volume_id,
        keys.folder,
        keys.access_key,
    )


def test_a_volume_that_is_not_mounted_is_an_error_and_no_new_folder(monkeypatch, tmp_path):
    """It would be lost with the node."""
    monkeypatch.setenv("HOME", str(tmp_path))
    told = {"kind": "folder", "path": "~/volume", "must_exist": True}
    with pytest.raises(BadConfig, match="nothing is mounted at ~/volume"):
        open_store(told)
    assert [] == list(tmp_path.iterdir())
    (tmp_path / "volume").mkdir()
    open_store(told).put("job/lease.json", b"{}")
    assert b"{}" == (tmp_path / "volume" / "job" / "lease.json").read_bytes()


def test_a_checkpoint_ends_with_a_sync_of_the_mount_point(monkeypatch, tmp_path):
    """Which commits it at Modal: the manifest is there by then."""
    mounted, work, synced = tmp_path / "volume", tmp_path / "work", []
    mounted.mkdir()
    real = store.sync_folder

    def sync(path):
        synced.append((path, len(list(mounted.rglob("*.manifest.json")))))
        real(path)

    monkeypatch.setattr(store, "sync_folder", sync)
    publish(open_store({"kind": "folder", "path": str(mounted), "must_exist": True}), a_checkpoint(work, 7))
    assert (str(mounted), 1) in synced


def spec_with(where):
    table = {"gpu": {"name": "h100"}, "work": {"hours": 1}, "checkpoint": {"store": where}}
    return job_from(table, NOW, "job.toml")


def test_a_jobs_store_names_its_volume():
    """One spelling, on the command line and in job.toml."""
    assert ("data", "", "") == tuple(
        spec_with(where).checkpoint.volume for where in ("volume:data", "s3://bucket/x", "")
    )
    for wrong in ("volume:", "volume:Data", "volume:a/b", "volume:-a", "volume:" + "a" * 41):
        with pytest.raises(ConfigError, match=r"checkpoint.store: .* names no volume: write volume:data"):
            spec_with(wrong)


def test_volumes_are_used_by_the_jobs_that_name_them():
    """By their descriptions as they are kept; an old one may know nothing of checkpoints."""
    jobs = [
        (f"job-{n}", spec_with(s).model_dump_json()) for n, s in enumerate(("volume:data", "", "volume:data"))
    ]
    assert {"data": ["job-0", "job-2"]} == used_by([*jobs, ("job-3", "{}")])
