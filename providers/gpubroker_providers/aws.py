"""AWS EC2: spot by availability zone, on-demand list prices, Capacity Blocks; without an account, feeds.

Poll and quote: Aws.offers -> aws_account.py with credentials, aws_feeds.py without -> Parsed. Prices are
for the whole instance. With credentials a spot offer is one zone, named by AvailabilityZoneId because
zone names differ between accounts; the public feed knows only the lowest price of a region.

Capacity Blocks are quoted for one instance and 24 hours, and never bought.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from gpubroker.errors import AuthFailed, BrokerError, MissingCredentials, Transient
from gpubroker.gpus import spellings
from gpubroker.model import Market, OfferQuery, Parsed, Slice
from gpubroker.provider import Access, PastPage, ProviderContext
from gpubroker_providers.aws_account import (
    HOME_REGION,
    PRODUCT_FIELDS,
    Account,
    endpoint_url,
    has_credentials,
    home_region,
    parse_capacity_blocks,
    parse_past_spot,
    parse_products,
    parse_spot_history,
)
from gpubroker_providers.aws_feeds import SPOT_URL, PublicFeeds, advised
from gpubroker_providers.aws_nodes import AwsNodes
from gpubroker_providers.aws_rows import gpu_types

# Where an offers file is read when no region is configured: the ones that sell the most GPU types in
# the US and Europe. Each is hundreds of MB per new version; `aws_regions` widens or narrows it.
OFFERS_FILE_REGIONS = ("us-east-1", "us-east-2", "us-west-2", "eu-central-1")
# Between two pages of a history: EC2 lets an account describe 20 times a second, and polls are there, too.
HISTORY_INTERVAL_S = 0.2
_BLOCK_FAMILY = re.compile(r"(?:p4d|p4de|p5|p5e|p5en|p6[a-z]*-[a-z0-9]+)\.")
_DRY_RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("describe_spot_price_history", {}),
    ("describe_instances", {}),
    (
        "run_instances",
        {
            "MinCount": 1,
            "MaxCount": 1,
            "InstanceType": "t3.micro",
            "ImageId": "resolve:ssm:/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64",
        },
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One call, and the part of the scope that goes unseen when it fails."""

    market: Market
    fetch: Callable[[], Parsed]
    region: str | None = None
    gpus: frozenset[str] | None = None

    def unseen(self, reason: str) -> Slice:
        return Slice(reason=reason, market=self.market, region=self.region, gpus=self.gpus)


class Aws(AwsNodes):
    """Live spot prices without an account; zones, on-demand, Capacity Blocks and nodes with one."""

    name = "aws"

    def __init__(self, context: ProviderContext) -> None:
        super().__init__(context)
        self._feeds_url = context.env.get("GPUBROKER_AWS_FEEDS_URL") or None

    def access(self) -> Access:
        """From variables and files alone: neither boto3 nor the metadata service is asked."""
        if has_credentials(self._context.env):
            return Access(has_credentials=True)
        return Access(
            has_credentials=False,
            missing="AWS_ACCESS_KEY_ID (or AWS_PROFILE)",
            without="public spot feed and price book",
            live_without=True,
        )

    def endpoint(self) -> str | None:
        """EC2 with credentials, the spot feed without."""
        env = self._context.env
        if not has_credentials(env):
            return self._feeds_url or SPOT_URL
        return endpoint_url(env, "ec2") or f"https://ec2.{home_region(env)}.amazonaws.com"

    def offers(self, query: OfferQuery, deadline_s: float) -> Parsed:
        """Current offers; what could not be seen is in `incomplete`.

        Raises what the first call raised when none succeeded.
        """
        # The caller throws away what comes after its deadline, so it has to be ready a little before.
        end_s = self._context.clock.monotonic_s() + deadline_s - min(0.5, deadline_s / 10)
        if has_credentials(self._context.env):
            try:
                return self._from_account(query, end_s)
            except MissingCredentials as error:
                note = f"{error}: prices are from the public feeds"
                return self._from_feeds(query, end_s) + Parsed(notes=(note,))
        return self._from_feeds(query, end_s)

    def check(self, deadline_s: float) -> str:
        """DryRun says what the credentials allow, at no cost."""
        if not has_credentials(self._context.env):
            raise MissingCredentials(self.name, "AWS_ACCESS_KEY_ID")
        end_s = self._context.clock.monotonic_s() + deadline_s
        account = Account(self._context, end_s)
        allowed, denied = [], []
        for operation, arguments in _DRY_RUNS:
            code = account.dry_run(operation, arguments)
            name = "".join(word.title() for word in operation.split("_"))
            if code == "DryRunOperation":
                allowed.append(name)
            else:
                denied.append(f"{name} ({code})")
        if not allowed:
            raise AuthFailed(self.name, "DryRun", f"refused: {', '.join(denied)}")
        return f"credentials work in {account.home_region}: DryRun allows {', '.join(allowed)}" + (
            f"; not proven: {', '.join(denied)}" if denied else ""
        )

    # What was

    @property
    def past_days(self) -> int:
        """DescribeSpotPriceHistory's."""
        return 90

    def past_regions(self, deadline_s: float) -> list[str]:
        """Those of the config, or all that the account may use."""
        account = self._history_account(deadline_s)
        return list(self._context.settings.aws_regions or account.regions())

    def past_prices(
        self, region: str, gpus: Collection[str] | None, since: datetime, deadline_s: float
    ) -> Iterator[PastPage]:
        """Spot by availability zone, page by page; a price that still holds from before `since` is in it."""
        end_s = self._context.clock.monotonic_s() + deadline_s
        account = self._history_account(deadline_s)
        types = gpu_types(gpus)

        def wait() -> None:
            self._context.limiter.wait(self.name, "spot history", HISTORY_INTERVAL_S, self._left_s(end_s))

        for rows in account.whole_pages(
            account.client("ec2", region),
            "describe_spot_price_history",
            "SpotPriceHistory",
            1000,
            wait,
            InstanceTypes=list(types),
            ProductDescriptions=["Linux/UNIX"],
            StartTime=since,
        ):
            yield parse_past_spot(rows, region)

    def _history_account(self, deadline_s: float) -> Account:
        if not has_credentials(self._context.env):
            raise MissingCredentials(self.name, "AWS_ACCESS_KEY_ID (or AWS_PROFILE)")
        return Account(self._context, self._context.clock.monotonic_s() + deadline_s)

    # Without an account

    def _from_feeds(self, query: OfferQuery, end_s: float) -> Parsed:
        feeds = PublicFeeds(self._context, self._feeds_url)
        regions = self._context.settings.aws_regions
        parts, unseen = [], []
        if _asks(query, "spot"):
            parts.append(_Part(market="spot", fetch=lambda: feeds.spot(regions, self._left_s(end_s))))
        if _asks(query, "on_demand"):
            if query.whole or feeds.has_cached_offers():
                fetch = partial(self._offers_files, feeds, query.whole, end_s)
                parts.append(_Part(market="on_demand", fetch=fetch))
            else:
                reason = "on-demand list prices come with a poll"
                unseen.append(Slice(reason=reason, market="on_demand"))
        if _asks(query, "reserved"):
            unseen.append(Slice(reason="Capacity Blocks are listed only with credentials", market="reserved"))
        return self._gather(parts, end_s, feeds) + Parsed(incomplete=tuple(unseen))

    def _offers_files(self, feeds: PublicFeeds, whole: bool, end_s: float) -> Parsed:
        """On-demand offers by region; unless `whole`, only what a poll has read and what still holds."""
        paths = feeds.offers_paths(self._left_s(end_s))
        regions = self._context.settings.aws_regions or (OFFERS_FILE_REGIONS if whole else tuple(paths))
        wanted = [region for region in regions if region in paths]
        if whole:
            # Ready before the answer that this is a part of, so that one slow region loses no other.
            parts_end_s = end_s - min(0.5, self._left_s(end_s) / 20)

            def read(region: str) -> Parsed:
                return feeds.read_offers(region, paths[region], self._left_s(parts_end_s))

            parts = [_Part(market="on_demand", region=r, fetch=partial(read, r)) for r in wanted]
            parsed = self._gather(parts, parts_end_s)
        else:
            cached = {region: feeds.cached_offers(region, paths[region]) for region in wanted}
            wanted = [region for region, found in cached.items() if found is not None]
            parsed = sum((found for found in cached.values() if found), Parsed(source="offers file"))
        if set(wanted) >= set(paths):
            return parsed
        reason = f"on-demand list prices are read for {', '.join(wanted) or 'no region'} only"
        return parsed + Parsed(incomplete=(Slice(reason=reason, market="on_demand"),))

    # With an account

    def _from_account(self, query: OfferQuery, end_s: float) -> Parsed:
        if not gpu_types(query.gpus):
            return Parsed(source="EC2")
        account = Account(self._context, end_s)
        regions = self._context.settings.aws_regions or account.regions()
        parts: list[_Part] = []
        unseen = []
        if _asks(query, "spot"):
            parts += self._spot_parts(account, regions, gpu_types(query.gpus))
        if _asks(query, "on_demand"):
            parts += self._product_parts(account, regions, query.gpus)
        if _asks(query, "reserved"):
            if query.whole:
                parts += self._block_parts(account, regions, gpu_types(query.gpus))
            else:
                unseen.append(Slice(reason="Capacity Blocks come with a poll", market="reserved"))
        feeds = PublicFeeds(self._context, self._feeds_url)
        return self._gather(parts, end_s, feeds) + Parsed(incomplete=tuple(unseen))

    def _spot_parts(self, account: Account, regions: Collection[str], types: tuple[str, ...]) -> list[_Part]:
        now = self._context.clock.now()

        def fetch(client: Any, region: str) -> Parsed:
            rows = account.pages(
                client,
                "describe_spot_price_history",
                "SpotPriceHistory",
                1000,
                InstanceTypes=list(types),
                ProductDescriptions=["Linux/UNIX"],
                StartTime=now,  # gives the price in force, as the last change before it
            )
            return parse_spot_history(rows, region)

        return [
            _Part(market="spot", region=region, fetch=partial(fetch, account.client("ec2", region), region))
            for region in regions
        ]

    def _product_parts(
        self, account: Account, regions: Collection[str], names: frozenset[str] | None
    ) -> list[_Part]:
        client = account.client("pricing", HOME_REGION)

        def fetch(types: Iterable[str]) -> Parsed:
            items: list[object] = []
            for instance_type in types:
                fields = {"instanceType": instance_type, **PRODUCT_FIELDS}
                filters = [{"Type": "TERM_MATCH", "Field": f, "Value": v} for f, v in fields.items()]
                asked = {"ServiceCode": "AmazonEC2", "FormatVersion": "aws_v1", "Filters": filters}
                items += account.pages(client, "get_products", "PriceList", 100, **asked)
            return parse_products(items, regions)

        meant = {name for known in spellings("aws", names).values() for name in known}
        by_name = {name: gpu_types((name,)) for name in sorted(meant)}
        return [
            _Part(market="on_demand", gpus=frozenset((name,)), fetch=partial(fetch, types))
            for name, types in by_name.items()
            if types
        ]

    def _block_parts(self, account: Account, regions: Collection[str], types: tuple[str, ...]) -> list[_Part]:
        def fetch(client: Any, region: str) -> Parsed:
            rows: list[object] = []
            for instance_type in filter(_BLOCK_FAMILY.match, types):
                rows += account.blocks(client, instance_type)
            return parse_capacity_blocks(rows, region)

        return [
            _Part(
                market="reserved", region=region, fetch=partial(fetch, account.client("ec2", region), region)
            )
            for region in regions
        ]

    # Both

    def _left_s(self, end_s: float) -> float:
        return max(0.0, end_s - self._context.clock.monotonic_s())

    def _gather(self, parts: list[_Part], end_s: float, advisor: PublicFeeds | None = None) -> Parsed:
        """All parts at once; one that fails loses only itself. `advisor` adds its bands to spot offers.

        Raises what the first part raised when none succeeded.
        """
        calls: list[Callable[[], Any]] = [part.fetch for part in parts]
        with_bands = advisor is not None and any(part.market == "spot" for part in parts)
        if advisor is not None and with_bands:
            calls.append(lambda: advisor.advice(self._left_s(end_s)))
        results: list[Any] = []
        for outcome in self._context.pool.map(lambda call: call(), calls, self._left_s(end_s)):
            if outcome.error is not None and not isinstance(outcome.error, BrokerError):
                raise outcome.error
            late = Transient(self.name, "offers", "no answer before the deadline") if outcome.late else None
            results.append(outcome.error or late or outcome.value)
        advice = results.pop() if with_bands else {}
        parsed = _joined(parts, results)
        if isinstance(advice, BrokerError):
            return parsed + Parsed(notes=(f"no interruption bands: {advice}",))
        return advised(parsed, advice)


def _joined(parts: list[_Part], results: list[Any]) -> Parsed:
    """The answers as one, with a slice for each part that failed, or for a market all of whose parts did."""
    answers = [result for result in results if isinstance(result, Parsed)]
    failed = [(p, e) for p, e in zip(parts, results, strict=True) if isinstance(e, BrokerError)]
    if failed and not answers:
        raise failed[0][1]
    alive = {part.market for part, result in zip(parts, results, strict=True) if isinstance(result, Parsed)}
    dead = {part.market: error for part, error in reversed(failed) if part.market not in alive}
    unseen = [part.unseen(str(error)) for part, error in failed if part.market in alive]
    unseen += [Slice(reason=str(error), market=market) for market, error in dead.items()]
    return sum(answers, Parsed()) + Parsed(incomplete=tuple(unseen))


def _asks(query: OfferQuery, market: Market) -> bool:
    return query.markets is None or market in query.markets
