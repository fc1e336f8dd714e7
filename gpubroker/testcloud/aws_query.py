"""EC2's query protocol: a form with dotted names in, XML out.

aws.py -> parse -> Ask -> aws_ec2.py -> a dict -> answer_xml -> the wire

    Filter.1.Name=instance-state-name&Filter.1.Value.1=running
        -> {"Filter": [{"Name": "instance-state-name", "Value": ["running"]}]}
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from fnmatch import translate
from typing import Any
from xml.sax.saxutils import escape

from gpubroker.testcloud.world import new_id

VERSION = "2016-11-15"
_NAMESPACE = f"http://ec2.amazonaws.com/doc/{VERSION}/"
_DEEPEST = 8
Test = Callable[[str], bool]
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LATEST_S = 2**33  # the year 2242


class Refused(Exception):
    """The request is not done; AWS's code says why."""

    def __init__(self, code: str, message: str = "", *, status: int = 400) -> None:
        super().__init__(code, message)
        self.code, self.message, self.status = code, message or code, status


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request to EC2."""

    region: str
    action: str
    params: Mapping[str, Any]
    raw: tuple[tuple[str, str], ...] = ()  # as it was sent, for moto
    stale_s: float = 0.0  # how old listings are
    twice: bool = False  # listing rows come twice

    def text(self, name: str, default: str = "") -> str:
        """A scalar parameter. Raises Refused when it is a structure."""
        value = self.params.get(name, default)
        if not isinstance(value, str):
            raise Refused("InvalidParameterValue", f"{name} is no single value")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of scalars, such as InstanceId.1."""
        return as_texts(self.params.get(name, []), name)

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number within bounds."""
        return whole(self.text(name, str(default)), name, least, most)

    def flag(self, name: str) -> bool:
        """true or false."""
        return is_true(self.text(name, "false"), name)

    def moment_s(self, name: str, default_s: float) -> float:
        """Seconds since 1970 of a time in ISO 8601."""
        return moment_s(self.text(name), name) if name in self.params else default_s


def parse(form: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Dotted names as structures. Raises Refused."""
    tree: dict[str, Any] = {}
    for name, value in form:
        if _NO_XML.search(name) or _NO_XML.search(value):
            raise Refused("InvalidParameterValue", "A parameter has characters that XML cannot carry")
        parts = name.split(".")
        if len(parts) > _DEEPEST:
            raise Refused("MalformedQueryString", f"{name[:100]} is too deep")
        here = tree
        for part in parts[:-1]:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise Refused("MalformedQueryString", f"{name[:100]} is both a value and a structure")
        if parts[-1] in here:
            raise Refused("MalformedQueryString", f"{name[:100]} comes twice")
        here[parts[-1]] = value
    return {name: _lists(value) for name, value in tree.items()}


def _lists(value: Any) -> Any:
    """{"1": a, "2": b} as [a, b], at every depth."""
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(one) for key, one in value.items()}
    if all(key.isascii() and key.isdigit() and len(key) < 6 for key in inner):
        return [inner[key] for key in sorted(inner, key=int)]
    return inner


def as_texts(value: Any, name: str) -> list[str]:
    """A list of scalars. Raises Refused."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise Refused("InvalidParameterValue", f"{name} is no list of values")
    return list(value)


def as_structure(value: Any, name: str, *known: str) -> Mapping[str, Any]:
    """A structure with no other members than these. Raises Refused."""
    if not isinstance(value, dict):
        raise Refused("InvalidParameterValue", f"{name} is no structure")
    for member in value:
        if member not in known:
            raise Refused("UnknownParameter", f"The parameter {name}.{member} is not recognized")
    return value


def as_structures(value: Any, name: str, *known: str) -> list[Mapping[str, Any]]:
    """A list of them. Raises Refused."""
    if not isinstance(value, list):
        raise Refused("InvalidParameterValue", f"{name} is no list")
    return [as_structure(one, name, *known) for one in value]


def member(structure: Mapping[str, Any], name: str, default: str = "") -> str:
    """A scalar in a structure. Raises Refused."""
    value = structure.get(name, default)
    if not isinstance(value, str):
        raise Refused("InvalidParameterValue", f"{name} is no single value")
    return value


def whole(text: str, name: str, least: int, most: int) -> int:
    """A whole number within bounds. Raises Refused."""
    if not re.fullmatch(r"-?[0-9]{1,12}", text) or not least <= int(text) <= most:
        raise Refused("InvalidParameterValue", f"Invalid value '{text[:40]}' for {name}")
    return int(text)


def is_true(text: str, name: str) -> bool:
    """true or false. Raises Refused."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise Refused("InvalidParameterValue", f"Invalid value '{text[:40]}' for {name}")
    return text.lower() in ("true", "1")


def usd(text: str, name: str) -> Decimal:
    """A price. Raises Refused."""
    try:
        price = Decimal(text)
    except InvalidOperation:
        price = Decimal("NaN")
    if not price.is_finite() or not 0 <= price < 10**9:
        raise Refused("InvalidParameterValue", f"Invalid value '{text[:40]}' for {name}")
    return price


def moment_s(text: str, name: str) -> float:
    """Seconds since 1970 of a time in ISO 8601. Raises Refused."""
    try:
        moment = datetime.fromisoformat(text)
        at_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise Refused("InvalidParameterValue", f"Invalid value '{text[:40]}' for {name}") from error
    if not 0 <= at_s <= _LATEST_S:
        raise Refused("InvalidParameterValue", f"Invalid value '{text[:40]}' for {name}")
    return at_s


def filters(ask: Ask) -> dict[str, Test]:
    """Filter name -> whether one of its values, with * and ? as wildcards, matches. Raises Refused."""
    found: dict[str, Test] = {}
    for one in as_structures(ask.params.get("Filter", []), "Filter", "Name", "Value"):
        name = member(one, "Name")
        values = as_texts(one.get("Value", []), "Filter.Value")
        if not name or not values or len(values) > 200:
            raise Refused("InvalidParameterValue", "A filter has a name and up to 200 values")
        patterns = [re.compile(_pattern(value), re.DOTALL) for value in values]
        found[name] = lambda text, patterns=patterns: any(p.match(text) for p in patterns)  # type: ignore[misc]
    return found


def passes(
    tests: Mapping[str, Test], values: Mapping[str, str], tags: Mapping[str, str] | None = None
) -> bool:
    """Whether something with these values and tags passes all filters. Raises Refused for an unknown one."""

    def fits(name: str, test: Test) -> bool:
        if tags is not None and name.startswith("tag"):
            return _has_tag(name, test, tags)
        return test(_value(values, name))

    return all(fits(name, test) for name, test in tests.items())


def _value(values: Mapping[str, str], name: str) -> str:
    if name not in values:
        raise Refused("InvalidParameterValue", f"The filter '{name[:60]}' is invalid")
    return values[name]


def _has_tag(name: str, fits: Test, tags: Mapping[str, str]) -> bool:
    if name == "tag-key":
        return any(fits(key) for key in tags)
    if name == "tag-value":
        return any(fits(value) for value in tags.values())
    if not name.startswith("tag:"):
        raise Refused("InvalidParameterValue", f"The filter '{name[:60]}' is invalid")
    key = name.removeprefix("tag:")
    return key in tags and fits(tags[key])


def _pattern(value: str) -> str:
    """A regular expression of a filter's value: only * and ? mean something, unless behind a backslash."""
    text = value.replace("\\*", "\0").replace("\\?", "\1").replace("[", "[[]")
    return translate(re.sub(r"\*+", "*", text)).replace("\0", r"\*").replace("\1", r"\?")


def page(ask: Ask, rows: list[Any], least: int = 5, most: int = 1000) -> tuple[list[Any], str]:
    """The rows of this page and the token of the next one, "" = none. Raises Refused."""
    start = whole(str(open_token(ask.text("NextToken")).get("at", 0)), "NextToken", 0, 10**9)
    size = ask.number("MaxResults", most, least, most) if "MaxResults" in ask.params else len(rows) + 1
    more = start + size < len(rows)
    return rows[start : start + size], make_token(at=start + size) if more else ""


def twice(ask: Ask, rows: list[Any]) -> list[Any]:
    """The rows of a listing, each twice where the fault script says so."""
    return [row for row in rows for _ in range(1 + ask.twice)]


def dry(ask: Ask) -> None:
    """Raises Refused when it was only asked whether it would be done."""
    if ask.flag("DryRun"):
        raise dry_run()


def dry_run() -> Refused:
    """It would be done."""
    message = "Request would have succeeded, but DryRun flag is set."
    return Refused("DryRunOperation", message, status=412)


def no_room(message: str, code: str = "") -> Refused:
    """AWS counts missing room among its own errors, a quota among the client's."""
    code = code or "InsufficientInstanceCapacity"
    return Refused(code, message, status=500 if code.startswith("Insufficient") else 400)


def make_token(**content: Any) -> str:
    """An opaque NextToken."""
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode()


def open_token(token: str) -> dict[str, Any]:
    """What make_token was given; {} for none. Raises Refused."""
    if not token:
        return {}
    try:
        content = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError) as error:
        raise Refused("InvalidParameterValue", "Unable to parse pagination token") from error
    if not isinstance(content, dict):
        raise Refused("InvalidParameterValue", "Unable to parse pagination token")
    return content


def answer_xml(action: str, body: Mapping[str, Any]) -> str:
    """An answer in EC2's envelope."""
    inner = xml("requestId", str(new_request_id())) + "".join(xml(k, v) for k, v in body.items())
    return f'{_HEAD}<{action}Response xmlns="{_NAMESPACE}">{inner}</{action}Response>'


def error_xml(code: str, message: str) -> str:
    """An error in EC2's envelope."""
    error = xml("Errors", {"Error": {"Code": code, "Message": message}})
    return f"{_HEAD}<Response>{error}{xml('RequestID', new_request_id())}</Response>"


def xml(name: str, value: Any) -> str:
    """An element; None gives nothing, a list its items."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        inner = "".join(xml(key, one) for key, one in value.items())
    elif isinstance(value, list | tuple):
        inner = "".join(xml("item", one) for one in value)
    elif isinstance(value, bool):
        inner = str(value).lower()
    else:
        inner = escape(str(value))
    return f"<{name}>{inner}</{name}>"


def iso(at_s: float) -> str:
    """As AWS writes a time."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def new_request_id() -> str:
    """As AWS writes one."""
    text = new_id()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


_HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
