"""The contract class of providers that keep network volumes, beside those of gpubroker.testing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar
from uuid import uuid4

import pytest

from gpubroker.errors import LaunchUncertain, ProviderError
from gpubroker.provider import TAG, Compute, Volumes, VolumeView
from gpubroker.testing import END_FAULTS, LIST_FAULTS, no_io

CREATE_FAULTS = ("5xx_before", "5xx_after", "drop_before", "drop_after", "429", "truncate")


class VolumesContract:
    """What every Volumes keeps to, shown on a vendor where volumes cost nothing.

    A subclass says `make`, `at_vendor`, and where and how large, as the vendor's rules want it:

        class TestAcmeKeepsVolumesByTheContract(VolumesContract):
            region, size_gb = "eu-1", 10

            def make(self):
                return Acme(context_for_the_fake_vendor)

            def at_vendor(self, name): ...  # ids of what bills under this name, not through the provider
    """

    region: ClassVar[str] = ""
    size_gb: ClassVar[int | None] = None
    unknown_id: ClassVar[str] = "987654321"  # well formed, and never was
    create_faults: ClassVar[tuple[str, ...]] = CREATE_FAULTS
    list_faults: ClassVar[tuple[str, ...]] = LIST_FAULTS
    delete_faults: ClassVar[tuple[str, ...]] = END_FAULTS
    deadline_s: ClassVar[float] = 30.0  # of one call
    _names: list[str]

    def make(self) -> Volumes:
        """The provider under test, newly built, with the credentials of an account of its own."""
        raise NotImplementedError

    def at_vendor(self, name: str) -> list[str]:
        """Ids of every volume of this name, asked another way than through the provider."""
        raise NotImplementedError

    def breaking(self, operation: str, kind: str) -> AbstractContextManager[None]:
        """The next request of "create", "list" or "delete" goes wrong in this way; none after the block."""
        raise NotImplementedError

    def make_untagged(self) -> str:
        """Make a volume as the account's owner would, without our tag; its id."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self) -> Iterator[None]:
        """However a test ends, what it made is deleted."""
        self._names = []
        yield
        for name in self._names:
            for volume_id in self.at_vendor(name):
                self.make().delete_volume(volume_id, self.deadline_s)

    # What it says without asking anybody

    def test_it_also_rents_the_nodes_that_mount_them(self) -> None:
        """A volume that no node can mount is of no use."""
        provider = self.make()
        assert isinstance(provider, Volumes), "one of Volumes' methods is missing"
        assert isinstance(provider, Compute), "one of Compute's methods is missing"

    def test_the_rules_are_constant_and_fit_this_test(self) -> None:
        """They are asked often, and never of the vendor."""
        provider = self.make()
        with no_io():
            rules = provider.volume_rules
            assert rules == provider.volume_rules
        assert rules.has_region is bool(self.region)
        assert (rules.sizes_gb is None) is (self.size_gb is None)
        assert rules.sizes_gb is None or 0 < rules.sizes_gb[0] <= rules.sizes_gb[1]

    def test_what_the_rules_forbid_is_not_asked(self) -> None:
        """A name that is not ours, a region too many or none, a size that cannot be: ValueError."""
        good, sizes = TAG + "data", self.make().volume_rules.sizes_gb
        wrong = [(name, self.size_gb, self.region) for name in ("", "data", TAG, TAG + "x/y")]
        wrong.append((good, self.size_gb, "" if self.region else "eu-1"))
        if sizes is None:
            wrong.append((good, 10, self.region))
        else:
            wrong += [(good, size, self.region) for size in (None, sizes[0] - 1, sizes[1] + 1)]
        for name, size_gb, region in wrong:
            with no_io(), pytest.raises(ValueError):  # noqa: PT011  any words will do
                self.make().create_volume(name, size_gb, region, self.deadline_s)

    # A volume's life

    def test_a_volume_is_made_listed_and_deleted(self) -> None:
        """By its name, whoever asks; afterwards nothing bills."""
        volume_id, name = self._made()
        assert [volume_id] == self.at_vendor(name)
        (view,) = [view for view in self._all() if view.name == name]
        assert (volume_id, self.region) == (view.id, view.region)
        assert view.size_gb is None or view.size_gb == (self.size_gb or 0)
        assert not view.is_in_use
        self.make().delete_volume(volume_id, self.deadline_s)
        assert [] == self.at_vendor(name)
        assert name not in {view.name for view in self._all()}

    def test_deleting_twice_is_no_error(self) -> None:
        """Nor what never was: level-triggered callers repeat themselves."""
        volume_id, name = self._made()
        for gone in (volume_id, volume_id, self.unknown_id):
            self.make().delete_volume(gone, self.deadline_s)
        assert [] == self.at_vendor(name)

    def test_only_volumes_with_our_tag_are_listed(self) -> None:
        """The account's other volumes are nobody's business."""
        try:
            other = self.make_untagged()
        except NotImplementedError:
            pytest.skip("nothing is made here without a tag")
        try:
            assert other not in {view.id for view in self._all()}
            assert all(view.name.startswith(TAG) for view in self._all())
        finally:
            self.make().delete_volume(other, self.deadline_s)

    # On a bad day

    @pytest.mark.parametrize("kind", CREATE_FAULTS)
    def test_a_create_that_goes_wrong_is_clean_or_uncertain(self, kind: str) -> None:
        """Either nothing was made, or the error names what to look for."""
        name, error = self._name(), None
        with self._broken("create", kind, self.create_faults):
            try:
                self.make().create_volume(name, self.size_gb, self.region, self.deadline_s)
            except ProviderError as raised:
                error = raised
        there = self.at_vendor(name)
        if error is None:
            assert 1 == len(there), f"it says that it made one, and there are {there}"
        elif isinstance(error, LaunchUncertain):
            assert name == error.tag
            assert len(there) <= 1, f"made more than once: {there}"
        else:
            assert [] == there, f"{type(error).__name__} says for sure that there is nothing: {error}"
            assert kind not in ("5xx_after", "drop_after"), f"nothing is sure about that: {error!r}"

    @pytest.mark.parametrize("kind", LIST_FAULTS)
    def test_a_listing_that_goes_wrong_is_an_error(self, kind: str) -> None:
        """Never an empty list, which would say that a job's checkpoints are gone."""
        _, name = self._made()
        found, error = list[VolumeView](), None
        with self._broken("list", kind, self.list_faults):
            try:
                found = self.make().list_volumes(self.deadline_s)
            except ProviderError as raised:
                error = raised
        assert error or name in {view.name for view in found}

    @pytest.mark.parametrize("kind", END_FAULTS)
    def test_a_delete_that_goes_wrong_is_said_until_it_is_done(self, kind: str) -> None:
        """No error means that nothing bills any more."""
        volume_id, name = self._made()
        with self._broken("delete", kind, self.delete_faults):
            try:
                self.make().delete_volume(volume_id, self.deadline_s)
            except ProviderError:
                pass
            else:
                assert [] == self.at_vendor(name)
        self.make().delete_volume(volume_id, self.deadline_s)
        assert [] == self.at_vendor(name)

    # Helpers

    def _name(self) -> str:
        name = f"{TAG}{uuid4().hex[:12]}"
        self._names.append(name)
        return name

    def _made(self) -> tuple[str, str]:
        name = self._name()
        return self.make().create_volume(name, self.size_gb, self.region, self.deadline_s), name

    def _all(self) -> list[VolumeView]:
        return self.make().list_volumes(self.deadline_s)

    @contextmanager
    def _broken(self, operation: str, kind: str, known: tuple[str, ...]) -> Iterator[None]:
        if kind not in known:
            pytest.skip(f"{kind} does not happen to {operation} here")
        try:
            broken = self.breaking(operation, kind)
        except NotImplementedError:
            pytest.skip("this vendor cannot be broken at will")
        with broken:
            yield
