"""What AWS tells an account, through boto3: spot by zone, list prices, Capacity Blocks; used by aws.py.

Poll: Account.pages -> parse_* -> Parsed. boto3 is imported when an Account is made, never before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from gpubroker.errors import (
    AuthFailed,
    BrokerError,
    ConfigError,
    MissingCredentials,
    PayloadChanged,
    ProviderError,
    Transient,
    Unreachable,
)
from gpubroker.model import Offer, Parsed
from gpubroker.money import SECONDS_PER_HOUR, parse_usd, round_usd
from gpubroker.provider import PastPage, PastPrice, ProviderContext
from gpubroker_providers.aws_rows import Sieve, instance_offer

HOME_REGION = "us-east-1"
BLOCK_HOURS = 24
PRODUCT_FIELDS = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "preInstalledSw": "NA",
    "capacitystatus": "Used",  # other products price reserved capacity, some of them at 0.00
}
_LINUX = ("Linux/UNIX", "Linux/UNIX (Amazon VPC)")
_CREDENTIAL_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_CREDENTIAL_LINE = re.compile(
    r"^\s*(aws_access_key_id|credential_process|sso_session|sso_start_url|login_session"
    r"|role_arn|web_identity_token_file)\s*=",
    re.MULTILINE,
)
_SYS_VENDOR = Path("/sys/devices/virtual/dmi/id/sys_vendor")
_REFUSED = re.compile(
    "UnauthorizedOperation|AuthFailure|ExpiredToken.*|RequestExpired|InvalidClientTokenId|OptInRequired"
    "|UnrecognizedClientException|InvalidSignature.*|IncompleteSignature|SignatureDoesNotMatch|AccessDenied.*|Blocked"
)
_BUSY = re.compile("RequestLimitExceeded|Throttl.*|TooManyRequests.*|(Service)?Unavailable|Internal.*")
_NOT_SOLD_THERE = re.compile("InvalidParameter.*|Unsupported.*")


def parse_spot_history(rows: Iterable[object], region: str) -> Parsed:
    """DescribeSpotPriceHistory: a row is a price change, so the newest of a type and zone is the price now.

    The zone is AvailabilityZoneId; AvailabilityZone stands in where an endpoint does not send it (moto).
    """
    return _spot_rows(rows, region).parsed(best=max, by=lambda kept: kept.details["since"])


def parse_past_spot(rows: Iterable[object], region: str) -> PastPage:
    """The same rows as what was: each is the price from its Timestamp until the next one of its zone."""
    offers, skipped = _spot_rows(rows, region).all()
    prices = (PastPrice(offer=one, since=datetime.fromisoformat(one.details["since"])) for one in offers)
    return PastPage(prices=tuple(prices), skipped=skipped)


def _spot_rows(rows: Iterable[object], region: str) -> Sieve:
    sieve = Sieve("DescribeSpotPriceHistory")
    path = "SpotPriceHistory[]"

    def offer(row: Mapping[str, object]) -> Offer:
        instance_type = sieve.take(row, f"{path}.InstanceType", str)
        product = sieve.take(row, f"{path}.ProductDescription", str)
        if product not in _LINUX:
            raise ValueError(f"ProductDescription is {product!r}, not Linux/UNIX")
        zone = row.get("AvailabilityZoneId") or sieve.take(row, f"{path}.AvailabilityZone", str)
        since = sieve.take(row, f"{path}.Timestamp", datetime).astimezone(UTC)
        price = parse_usd(sieve.take(row, f"{path}.SpotPrice", object))
        details = {"since": since.isoformat()}
        return instance_offer(instance_type, "spot", price, region=region, zone=str(zone), details=details)

    for row in rows:
        named = row if isinstance(row, Mapping) else {}
        zone = named.get("AvailabilityZoneId") or named.get("AvailabilityZone") or region
        sieve.keep(f"{zone} {named.get('InstanceType', '?')}", offer, named)
    return sieve


def parse_products(items: Iterable[object], regions: Collection[str]) -> Parsed:
    """GetProducts: PriceList is a list of JSON texts. Those of other regions are out of scope, not rows."""
    sieve = Sieve("GetProducts")

    def offer(document: object) -> Offer:
        attributes = _attributes(document, sieve)
        for key, wanted in PRODUCT_FIELDS.items():
            found = sieve.take(attributes, f"PriceList[].product.attributes.{key}", str)
            if found != wanted:
                raise ValueError(f"{key} is {found!r}, not {wanted}")
        instance_type = sieve.take(attributes, "PriceList[].product.attributes.instanceType", str)
        region = sieve.take(attributes, "PriceList[].product.attributes.regionCode", str)
        return instance_offer(instance_type, "on_demand", _hourly_price(document, sieve), region=region)

    for at, item in enumerate(items):
        try:
            document = json.loads(str(item), parse_float=str, parse_constant=str)  # as text: never a float
        except (ValueError, RecursionError):
            sieve.skip(f"PriceList[{at}]", "not JSON")
            continue
        try:
            attributes = _attributes(document, Sieve(sieve.operation))
        except ValueError:
            attributes = {}
        region = attributes.get("regionCode")
        if not isinstance(region, str) or region in regions:
            sieve.keep(f"{region or '?'} {attributes.get('instanceType', '?')} [{at}]", offer, document)
    return sieve.parsed()


def _attributes(document: object, sieve: Sieve) -> Mapping[str, object]:
    product = sieve.take(document, "PriceList[].product", dict)
    return sieve.take(product, "PriceList[].product.attributes", dict)


def _hourly_price(document: object, sieve: Sieve) -> Decimal:
    path = "PriceList[].terms.OnDemand"
    terms = sieve.take(sieve.take(document, "PriceList[].terms", dict), path, dict)
    prices = []
    for term in terms.values():
        for dimension in sieve.take(term, f"{path}.*.priceDimensions", dict).values():
            if sieve.take(dimension, f"{path}.*.priceDimensions.*.unit", str) == "Hrs":
                per_unit = sieve.take(dimension, f"{path}.*.priceDimensions.*.pricePerUnit", dict)
                prices.append(sieve.take(per_unit, f"{path}.*.priceDimensions.*.pricePerUnit.USD", object))
    if len(prices) != 1:
        raise ValueError(f"OnDemand has {len(prices)} hourly prices, not one")
    return parse_usd(prices[0])


def parse_capacity_blocks(rows: Iterable[object], region: str) -> Parsed:
    """DescribeCapacityBlockOfferings: UpfrontFee buys one instance for the whole duration."""
    sieve = Sieve("DescribeCapacityBlockOfferings")
    path = "CapacityBlockOfferings[]"

    def offer(row: Mapping[str, object]) -> Offer:
        instance_type = sieve.take(row, f"{path}.InstanceType", str)
        count = sieve.take(row, f"{path}.InstanceCount", int)
        if count != 1:
            raise ValueError(f"InstanceCount is {count}, not 1")
        currency = sieve.take(row, f"{path}.CurrencyCode", str)
        if currency != "USD":
            raise ValueError(f"CurrencyCode is {currency!r}, not USD")
        hours = sieve.take(row, f"{path}.CapacityBlockDurationHours", int)
        minutes = row.get("CapacityBlockDurationMinutes") or 0
        duration_s = hours * SECONDS_PER_HOUR + (minutes * 60 if isinstance(minutes, int) else 0)
        if duration_s <= 0:
            raise ValueError(f"CapacityBlockDurationHours is {hours}")
        return instance_offer(
            instance_type,
            "reserved",
            _fee_per_hour(sieve.take(row, f"{path}.UpfrontFee", object), duration_s),
            sku=f"{instance_type}/block-{hours}h",
            region=region,
            zone=sieve.take(row, f"{path}.AvailabilityZone", str),
            minimum_s=duration_s,
            listing_id=str(row.get("CapacityBlockOfferingId") or ""),
            details={"starts": _iso(row.get("StartDate")), "ends": _iso(row.get("EndDate"))},
        )

    for row in rows:
        named = row if isinstance(row, Mapping) else {}
        row_id = f"{region} {named.get('InstanceType', '?')} {named.get('CapacityBlockOfferingId', '?')}"
        sieve.keep(row_id, offer, named)
    return sieve.parsed()


def _fee_per_hour(fee: object, duration_s: int) -> Decimal:
    """Rounded once, after the division. Raises ValueError."""
    parse_usd(fee)
    usd_per_hour = round_usd(Decimal(str(fee).strip()) * SECONDS_PER_HOUR / duration_s)
    if not usd_per_hour:
        raise ValueError(f"UpfrontFee {fee} rounds to zero an hour")
    return usd_per_hour


def _iso(moment: object) -> str:
    return moment.astimezone(UTC).isoformat() if isinstance(moment, datetime) else ""


def has_credentials(env: Mapping[str, str]) -> bool:
    """Whether AWS's standard chain is likely to find some: by a look at variables and files."""
    if any(env.get(variable) for variable in _CREDENTIAL_VARIABLES):
        return True
    home = Path(env.get("HOME") or Path.home())
    files = (
        env.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials",
        env.get("AWS_CONFIG_FILE") or home / ".aws" / "config",
    )
    if any(_CREDENTIAL_LINE.search(_text(Path(file).expanduser())) for file in files):
        return True
    # An instance may have a role; whether it does only its metadata service knows.
    without_metadata = env.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    return not without_metadata and _text(_SYS_VENDOR).strip() == "Amazon EC2"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def home_region(env: Mapping[str, str]) -> str:
    """Where calls go that name no region, as far as variables say."""
    return env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or HOME_REGION


def endpoint_url(env: Mapping[str, str], service: str) -> str | None:
    """The SDK's own override. None = AWS."""
    return env.get(f"AWS_ENDPOINT_URL_{service.upper()}") or env.get("AWS_ENDPOINT_URL") or None


class Account:
    """boto3 with the user's credentials: its answers as rows, its errors as ours.

    Keys, profile, region and endpoint come from the context's environment; what else AWS's standard
    chain reads (files, SSO, roles), boto3 finds itself. `attempts`: at most so many of one call.
    """

    def __init__(self, context: ProviderContext, end_s: float, *, attempts: int = 3) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        env = self._env = context.env
        left_s = max(0.1, end_s - context.clock.monotonic_s())
        keys = {
            "aws_access_key_id": env.get("AWS_ACCESS_KEY_ID"),
            "aws_secret_access_key": env.get("AWS_SECRET_ACCESS_KEY"),
            "aws_session_token": env.get("AWS_SESSION_TOKEN"),
        }
        if keys["aws_access_key_id"] and not keys["aws_secret_access_key"]:
            raise MissingCredentials("aws", "AWS_SECRET_ACCESS_KEY")
        self._clients: dict[tuple[str, str], Any] = {}
        self.secrets = tuple(secret for secret in keys.values() if secret)
        try:
            self._session = boto3.Session(
                **(keys if keys["aws_access_key_id"] else {}),  # type: ignore[arg-type]  # all of them texts
                profile_name=None if keys["aws_access_key_id"] else env.get("AWS_PROFILE") or None,
                region_name=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or None,
            )
        except BotoCoreError as error:
            raise ConfigError(f"aws: {error}") from error
        self.home_region = self._session.region_name or HOME_REGION
        self._config = Config(
            connect_timeout=min(left_s, 5),
            read_timeout=min(left_s, 20),
            retries={"mode": "standard", "total_max_attempts": max(1, min(attempts, int(left_s // 2)))},
            max_pool_connections=32,
        )

    def client(self, service: str, region: str) -> Any:
        """Made in the caller's thread: making one is not safe in several, using one is."""
        if (service, region) not in self._clients:
            with self._our_errors(service):
                self._clients[service, region] = self._session.client(
                    service,  # type: ignore[call-overload]  # the stubs know services by literal names
                    region_name=region,
                    endpoint_url=endpoint_url(self._env, service),
                    config=self._config,
                )
        return self._clients[service, region]

    def regions(self) -> tuple[str, ...]:
        """Regions that this account may use."""
        status = {"Name": "opt-in-status", "Values": ["opt-in-not-required", "opted-in"]}
        client = self.client("ec2", self.home_region)
        with self._our_errors("DescribeRegions"):
            answer = client.describe_regions(Filters=[status])
        names = [row.get("RegionName") for row in self._rows(answer, "DescribeRegions", "Regions")]
        if not all(names):
            raise PayloadChanged("aws", "DescribeRegions", "Regions[].RegionName", "missing")
        return tuple(sorted(names))

    def pages(self, client: Any, operation: str, key: str, size: int, **asked: Any) -> Iterator[Any]:
        """The rows of all pages."""
        for page in self.whole_pages(client, operation, key, size, lambda: None, **asked):
            yield from page

    def whole_pages(
        self, client: Any, operation: str, key: str, size: int, before: Callable[[], None], **asked: Any
    ) -> Iterator[list[Any]]:
        """Page by page; `before` is called before each call."""
        name = client.meta.method_to_api_mapping[operation]
        pages = iter(client.get_paginator(operation).paginate(**asked, PaginationConfig={"PageSize": size}))
        while True:
            before()
            with self._our_errors(name):
                page = next(pages, None)
            if page is None:
                return
            yield self._rows(page, name, key)

    def ask(self, client: Any, operation: str, **asked: Any) -> Any:
        """One call and its answer."""
        with self._our_errors(client.meta.method_to_api_mapping[operation]):
            return getattr(client, operation)(**asked)

    def rows(self, client: Any, operation: str, key: str, **asked: Any) -> list[Any]:
        """One call, and the list that its answer is."""
        answer = self.ask(client, operation, **asked)
        return self._rows(answer, client.meta.method_to_api_mapping[operation], key)

    def blocks(self, client: Any, instance_type: str) -> list[Any]:
        """Capacity Blocks of one instance for a day. [] where the region does not sell them."""
        asked = {"InstanceType": instance_type, "InstanceCount": 1, "CapacityDurationHours": BLOCK_HOURS}
        try:
            return list(
                self.pages(
                    client, "describe_capacity_block_offerings", "CapacityBlockOfferings", 100, **asked
                )
            )
        except ProviderError as error:
            if _NOT_SOLD_THERE.match(error.detail):
                return []
            raise

    def dry_run(self, operation: str, arguments: Mapping[str, Any]) -> str:
        """AWS's code: DryRunOperation when it would have been done, another one when not."""
        from botocore.exceptions import ClientError

        client = self.client("ec2", self.home_region)
        with self._our_errors(operation):
            try:
                getattr(client, operation)(DryRun=True, **arguments)
            except ClientError as error:
                if isinstance(our_error(operation, error), Transient):
                    raise
                return error_code(error)
        return "DryRun was ignored"

    def _rows(self, answer: Any, operation: str, key: str) -> list[Any]:
        rows = answer.get(key) if isinstance(answer, Mapping) else None
        if not isinstance(rows, list):
            raise PayloadChanged("aws", operation, key, "is missing")
        return rows

    @contextmanager
    def _our_errors(self, operation: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError) as error:
            raise our_error(operation, error, self.secrets) from error


def our_error(operation: str, error: Exception, secrets: Iterable[str] = ()) -> BrokerError:
    """What botocore raised, by what the caller does next. The detail starts with AWS's error code."""
    from botocore import exceptions as sdk
    from botocore.parsers import ResponseParserError

    if isinstance(error, sdk.NoCredentialsError | sdk.PartialCredentialsError):
        return MissingCredentials("aws", "AWS_ACCESS_KEY_ID")
    detail = str(error)
    kind: type[ProviderError] = ProviderError
    if isinstance(error, sdk.ClientError):
        code, status = error_code(error), http_status(error)
        detail = f"{code}: {error.response.get('Error', {}).get('Message', '')}"
        if _REFUSED.fullmatch(code) or status == 401:
            kind = AuthFailed
        elif _BUSY.fullmatch(code) or status == 429 or status >= 500:
            kind = Transient
    elif isinstance(error, sdk.EndpointConnectionError | sdk.ConnectTimeoutError | sdk.ProxyConnectionError):
        kind = Unreachable
    elif isinstance(error, sdk.HTTPClientError):
        kind = Transient
    elif isinstance(error, sdk.SSOError | sdk.TokenRetrievalError | sdk.CredentialRetrievalError):
        kind = AuthFailed
    for secret in secrets:
        detail = detail.replace(secret, "[key]")
    detail = " ".join(detail.split())[:256]
    if isinstance(error, ResponseParserError):
        return PayloadChanged("aws", operation, "$", detail)
    return kind("aws", operation, detail)


def error_code(error: Exception) -> str:
    """AWS's own word for it; "?" where there is none."""
    return str(_answer(error).get("Error", {}).get("Code", "?"))


def http_status(error: Exception) -> int:
    """0 where there was no answer."""
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _answer(error: Exception) -> Mapping[str, Any]:
    """Only a ClientError has one; what other errors call `response` is not AWS's."""
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, Mapping) else {}
