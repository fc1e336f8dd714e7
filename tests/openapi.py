"""Do the test cloud's requests and answers keep to the vendors' own OpenAPI documents?

    client -> test cloud -> Exchange -> Document.violations -> minus KNOWN_DEVIATIONS -> Checker.unexplained

The documents lie outside this repository, in `../shared/reference/specs` or where GPUBROKER_SPECS says; without
them `checker` skips the test. An answer is always checked; a request only when it was accepted, for a refused one
may be wrong on purpose.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

SPECS = Path(os.environ.get("GPUBROKER_SPECS", Path(__file__).parents[2] / "shared/reference/specs"))
_FILES = {
    "vast": "vast-openapi.yaml",
    "runpod": "runpod-rest-v2-openapi.json",
    "lambda": "lambda-cloud-openapi-1.8.3.json",
}
_METHODS = ("get", "put", "post", "delete", "patch")


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """Something the document forbids and the vendor does, or the other way round."""

    vendor: str
    operation: str  # its operationId, or "METHOD /path" without one; with shell wildcards
    text: str  # what the violation says; with shell wildcards
    reason: str


KNOWN_DEVIATIONS = (
    Deviation(
        vendor="runpod",
        operation="POST /graphql",
        text="request: POST /graphql is not in the document",
        reason="GraphQL is another API on the same host, older than REST v2, and has no such document",
    ),
    Deviation(
        vendor="lambda",
        operation="*",
        text="answer: status 429 *",
        reason="the document's text states the rate limits, but lists no 429 for any operation",
    ),
    Deviation(
        vendor="lambda",
        operation="*",
        text="answer: status 400 *",
        reason="for several operations with a body the document lists no answer to one of the wrong form",
    ),
    Deviation(
        vendor="vast",
        operation="*",
        text="answer 429: text/plain, *",
        reason="clients get plain text; the document has JSON with the same sentence in it",
    ),
    Deviation(
        vendor="vast",
        operation="searchOffers",
        text="answer: status 4?? is not listed",
        reason="the document lists 404 as Unauthorized; a wrong key gets 401 as everywhere, and its daily quota 429",
    ),
    Deviation(
        vendor="vast",
        operation="searchOffers",
        text="request: $.type 'on-demand' *",
        reason="the document's own example sends it, and so does the vendor's client",
    ),
    Deviation(
        vendor="vast",
        operation="searchOffers",
        text="request: $.order * is too short",
        reason="the document puts the pair's length on the list of pairs; its text says what is meant",
    ),
    Deviation(
        vendor="vast",
        operation="createInstance",
        text="request: $.env * is not of type 'string'",
        reason="the vendor's guide and client send an object; both are accepted",
    ),
    Deviation(
        vendor="vast",
        operation="createInstance",
        text="request: $.price None is not of type 'number'",
        reason="the vendor's client sends null for a rental on demand",
    ),
    Deviation(
        vendor="vast",
        operation="showInstance",
        text="answer 200: $.instances None is not of type 'object'",
        reason="what is gone is null (vast-ai/vast-cli#405)",
    ),
    Deviation(
        vendor="vast",
        operation="showInstance",
        text="answer 200: $.instances.ports *",
        reason="the document's newer list has what clients read: an object, or null while it does not run",
    ),
    Deviation(
        vendor="vast",
        operation="destroyInstance",
        text="answer: status 403 is not listed",
        reason="an instance's own key that asks for another instance; the document is silent on such keys",
    ),
    Deviation(
        vendor="vast",
        operation="deleteVolume",
        text="request: *",
        reason="the vendor's client sends the id in the query, with an empty object",
    ),
    Deviation(
        vendor="vast",
        operation="rentVolume",
        text="answer: status 4?? is not listed",
        reason="the document lists no answer but 200; an offer may be gone and a size too large",
    ),
    Deviation(
        vendor="vast",
        operation="PUT /api/v0/search/asks*",
        text="request: * is not in the document",
        reason="the vendor's client has it; the document does not",
    ),
    Deviation(
        vendor="vast",
        operation="GET /api/v0/instances*",
        text="request: * is not in the document",
        reason="the deprecated list, answered with 410",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request and what it was answered."""

    method: str
    url: str  # or the path alone, with its query
    request_body: bytes = b""
    status: int
    content_type: str = "application/json"
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, response: Any) -> "Exchange":
        """From an answer of `requests`."""
        sent = response.request.body or b""
        return cls(
            method=response.request.method,
            url=response.request.url,
            request_body=sent.encode() if isinstance(sent, str) else sent,
            status=response.status_code,
            content_type=response.headers.get("Content-Type", ""),
            body=response.content,
            headers=response.headers,
        )


class Document:
    """One vendor's document."""

    def __init__(self, vendor: str, contents: Mapping[str, Any]) -> None:
        self.vendor = vendor
        self._contents = contents
        resource = Resource(contents=contents, specification=DRAFT202012)
        self._registry = Registry().with_resource("urn:document", resource)
        # The most literal path first: /pods/mine goes before /pods/{id}.
        paths = sorted(contents["paths"], key=lambda path: (path.count("{"), path))
        self._paths = [(_pattern(path), path) for path in paths]

    def operation(self, method: str, path: str) -> tuple[str, str] | None:
        """(name, path as the document has it) of what a request calls; None = not in the document."""
        for pattern, listed in self._paths:
            operation = self._contents["paths"][listed].get(method.lower())
            if operation is not None and pattern.fullmatch(path.rstrip("/")):
                return operation.get("operationId", f"{method.upper()} {listed}"), listed
        return None

    def violations(self, exchange: Exchange) -> Iterator[str]:
        """What is wrong with it, each as one line."""
        split = urlsplit(exchange.url)
        found = self.operation(exchange.method, split.path)
        if found is None:
            if exchange.status not in (404, 405):
                yield f"request: {exchange.method} {split.path} is not in the document"
            return
        pointer = ("paths", found[1], exchange.method.lower())
        if exchange.status < 400:
            yield from self._request(pointer, exchange, split.query)
        yield from self._answer(pointer, exchange)

    def _request(self, pointer: tuple[str, ...], exchange: Exchange, query: str) -> Iterator[str]:
        yield from self._query(pointer, query)
        body, at = self._at((*pointer, "requestBody"))
        if body is None:
            return
        media = body.get("content", {}).get("application/json")
        if not exchange.request_body:
            if body.get("required"):
                yield "request: no body"
        elif media is not None:
            yield from self._errors("request", exchange.request_body, (*at, "content", "application/json"))

    def _query(self, pointer: tuple[str, ...], query: str) -> Iterator[str]:
        listed = {}
        for place in (pointer[:-1], pointer):
            for index in range(len(self._at((*place, "parameters"))[0] or ())):
                parameter, at = self._at((*place, "parameters", str(index)))
                if parameter["in"] == "query":
                    listed[parameter["name"]] = (parameter, at)
        sent = dict(parse_qsl(query, keep_blank_values=True))
        for name, (parameter, at) in listed.items():
            if name in sent:
                schema, _ = self._at((*at, "schema"))
                value = self._decoded(sent[name], schema or {})
                yield from self._errors(f"request: query {name}", value, at)
            elif parameter.get("required"):
                yield f"request: query {name} is missing"
        for name in sorted(set(sent) - set(listed)):
            yield f"request: query {name} is not in the document"

    def _decoded(self, text: str, schema: Mapping[str, Any]) -> Any:
        kind = schema.get("type")
        if kind == "array":
            return text.split(",")
        if kind in ("integer", "number", "boolean", "object"):
            try:
                return json.loads(text)
            except ValueError:
                return text
        return text

    def _answer(self, pointer: tuple[str, ...], exchange: Exchange) -> Iterator[str]:
        responses, _ = self._at((*pointer, "responses"))
        status = str(exchange.status)
        key = status if status in responses else "default"
        if key not in responses:
            yield f"answer: status {status} is not listed"
            return
        response, at = self._at((*pointer, "responses", key))
        content = response.get("content") or {}
        for name, header in (response.get("headers") or {}).items():
            if header.get("required") and name not in exchange.headers:
                yield f"answer {status}: header {name} is missing"
        kind = exchange.content_type.partition(";")[0].strip()
        if kind in content and kind.endswith("json"):
            yield from self._errors(f"answer {status}", exchange.body, (*at, "content", kind))
        elif content and kind not in content:
            yield f"answer {status}: {kind or 'no content type'}, listed are {', '.join(content)}"
        elif not content and exchange.body and status == "204":
            yield "answer 204: has a body"

    def _errors(self, where: str, value: Any, holder: tuple[str, ...]) -> Iterator[str]:
        """Against the schema in `holder`; bytes are JSON."""
        if self._at((*holder, "schema"))[0] is None:
            return
        if isinstance(value, bytes):
            try:
                value = json.loads(value)
            except ValueError:
                yield f"{where}: not JSON: {value[:80]!r}"
                return
        reference = "/".join(part.replace("~", "~0").replace("/", "~1") for part in (*holder, "schema"))
        validator = Draft202012Validator(
            {"$ref": f"urn:document#/{reference}"}, registry=self._registry, format_checker=FormatChecker()
        )
        for error in validator.iter_errors(value):
            yield f"{where}: {error.json_path} {error.message}"

    def _at(self, pointer: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
        """What lies there, with the references on the way followed, and where it really is."""
        here: Any = self._contents
        at: tuple[str, ...] = ()
        for part in pointer:
            here = here[int(part)] if isinstance(here, list) else (here or {}).get(part)
            at = (*at, part)
            while isinstance(here, dict) and isinstance(here.get("$ref"), str):
                at = tuple(here["$ref"].removeprefix("#/").split("/"))
                here, at = self._at(at)
        return here, at


@dataclass(kw_only=True)
class Checker:
    """Collects what a test sends and is answered; `unexplained` must stay empty."""

    document: Document
    accepted: set[str] = field(default_factory=set)  # operations that have succeeded
    unexplained: list[str] = field(default_factory=list)
    deviations: set[str] = field(default_factory=set)  # reasons that were needed

    def see(self, exchange: Exchange) -> None:
        """Check one exchange."""
        found = self.document.operation(exchange.method, urlsplit(exchange.url).path)
        name = found[0] if found else f"{exchange.method} {unquote(urlsplit(exchange.url).path)}"
        if found and exchange.status < 400:
            self.accepted.add(name)
        for text in self.document.violations(exchange):
            reason = _reason(self.document.vendor, name, text)
            if reason is None:
                self.unexplained.append(f"{name}: {text}")
            else:
                self.deviations.add(reason)

    def hook(self, response: Any, *_: Any, **__: Any) -> None:
        """For `requests`: session.hooks["response"].append(checker.hook)."""
        self.see(Exchange.of(response))


def checker(vendor: str) -> Checker:
    """For vast, runpod or lambda. Skips the test where the document is absent."""
    return Checker(document=_document(vendor, str(_file(vendor))))


def has(vendor: str) -> bool:
    """Whether the document is there."""
    return (SPECS / _FILES[vendor]).is_file()


def _file(vendor: str) -> Path:
    path = SPECS / _FILES[vendor]
    if not has(vendor):
        pytest.skip(f"{path.name} is not in {SPECS}; GPUBROKER_SPECS says where the vendors' documents are")
    return path


@cache
def _document(vendor: str, path: str) -> Document:
    text = Path(path).read_text(encoding="utf-8")
    if path.endswith(".json"):
        return Document(vendor, json.loads(text))
    yaml = pytest.importorskip("yaml", reason="PyYAML reads vast's document")
    return Document(vendor, _with_plain_keys(yaml.safe_load(text)))


def _with_plain_keys(value: Any) -> Any:
    """YAML reads a status as a number and a time as an object; JSON has neither."""
    if isinstance(value, dict):
        return {str(key): _with_plain_keys(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_plain_keys(inner) for inner in value]
    return value


def _pattern(path: str) -> re.Pattern[str]:
    parts = re.split(r"\{[^}]+\}", path.rstrip("/"))
    return re.compile("[^/]+".join(re.escape(part) for part in parts))


def _reason(vendor: str, operation: str, text: str) -> str | None:
    for known in KNOWN_DEVIATIONS:
        if (
            vendor == known.vendor
            and fnmatchcase(operation, known.operation)
            and fnmatchcase(text, known.text)
        ):
            return known.reason
    return None
