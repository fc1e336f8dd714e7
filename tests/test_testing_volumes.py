"""The contract of volumes: a good provider passes all of it, and ways of breaking it are noticed."""

from contextlib import contextmanager

import pytest

from gpubroker.errors import LaunchUncertain, Transient
from gpubroker.provider import TAG, VolumeRules, VolumeView
from gpubroker.testing import LIST_FAULTS
from gpubroker.testing_volumes import VolumesContract
from tests.test_testing_compute import AcmeNodes, Vendor


class AcmeVolumes(AcmeNodes):
    """A provider that does everything right; its vendor is in memory."""

    volume_rules = VolumeRules(has_region=True, sizes_gb=(10, 100))

    def create_volume(self, name, size_gb, region, deadline_s):
        good_name = name.startswith(TAG) and name.removeprefix(TAG).isalnum()
        if not good_name or not region or size_gb is None or not 10 <= size_gb <= 100:
            raise ValueError("not to be asked")
        kind = self.vendor.fault("create")
        if kind == "429":
            raise Transient("acme", "create", "too often")
        volume_id = "" if kind.endswith("_before") else self.vendor.rent(name)
        if kind:
            raise LaunchUncertain("acme", "create", kind, tag=name)
        return volume_id

    def list_volumes(self, deadline_s):
        kind = self.vendor.fault("list")
        if kind in LIST_FAULTS:
            raise Transient("acme", "list", kind)
        return [
            VolumeView(id=volume_id, name=name, region="eu-1", size_gb=10)
            for volume_id, name in self.vendor.nodes.items()
            if name.startswith(TAG)
        ]

    def delete_volume(self, volume_id, deadline_s):
        kind = self.vendor.fault("delete")
        if kind:
            raise Transient("acme", "delete", kind)
        self.vendor.nodes.pop(volume_id, None)


class TestAcmeKeepsVolumesByTheContract(VolumesContract):
    """As an outsider would write it."""

    region, size_gb = "eu-1", 10
    provider = AcmeVolumes

    @pytest.fixture(autouse=True)
    def _vendor(self):
        self.vendor = Vendor()

    def make(self):
        return self.provider(self.vendor)

    def at_vendor(self, name):
        return [volume_id for volume_id, known in self.vendor.nodes.items() if known == name]

    def make_untagged(self):
        return self.vendor.rent("mine")

    @contextmanager
    def breaking(self, operation, kind):
        self.vendor.broken = (operation, kind)
        yield
        self.vendor.broken = ("", "")


class Forgetful(AcmeVolumes):
    """Says for sure that there is nothing, and does not know."""

    def create_volume(self, name, size_gb, region, deadline_s):
        try:
            return super().create_volume(name, size_gb, region, deadline_s)
        except LaunchUncertain:
            raise Transient("acme", "create", "no answer") from None


class Hopeful(AcmeVolumes):
    """Shows an empty account when the vendor is away."""

    def list_volumes(self, deadline_s):
        try:
            return super().list_volumes(deadline_s)
        except Transient:
            return []


class Careless(AcmeVolumes):
    """Asks for whatever it is told."""

    def create_volume(self, name, size_gb, region, deadline_s):
        return self.vendor.rent(name)


class Curious(AcmeVolumes):
    """Lists what is not ours."""

    def list_volumes(self, deadline_s):
        return [VolumeView(id=i, name=name, region="eu-1") for i, name in self.vendor.nodes.items()]


@pytest.mark.parametrize(
    ("provider", "broken"),
    [
        pytest.param(
            Forgetful, lambda t: t.test_a_create_that_goes_wrong_is_clean_or_uncertain("5xx_after"), id="forgetful"
        ),
        pytest.param(Hopeful, lambda t: t.test_a_listing_that_goes_wrong_is_an_error("5xx_before"), id="hopeful"),
        pytest.param(Careless, lambda t: t.test_what_the_rules_forbid_is_not_asked(), id="careless"),
        pytest.param(Curious, lambda t: t.test_only_volumes_with_our_tag_are_listed(), id="curious"),
        pytest.param(AcmeNodes, lambda t: t.test_it_also_rents_the_nodes_that_mount_them(), id="no volumes"),
    ],
)  # fmt: skip
def test_the_contract_notices(provider, broken):
    """Each provider is wrong in one way."""
    contract = TestAcmeKeepsVolumesByTheContract()
    contract.vendor, contract._names, contract.provider = Vendor(), [], provider
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        broken(contract)
