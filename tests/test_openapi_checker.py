"""The checker of exchanges finds what it is there to find; by a small document of its own."""

import json

import pytest

from tests.openapi import Checker, Document, Exchange

DOCUMENT = Document(
    "none",
    {
        "paths": {
            "/things/{id}": {
                "parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}],
                "put": {
                    "operationId": "putThing",
                    "parameters": [
                        {"name": "count", "in": "query", "schema": {"type": "integer", "minimum": 1}}
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}},
                    },
                    "responses": {
                        "200": {
                            "content": {
                                "application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}
                            }
                        },
                        "404": {"$ref": "#/components/responses/Gone"},
                    },
                },
            }
        },
        "components": {
            "schemas": {
                "Thing": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string"},
                        "made": {"type": "string", "format": "date-time"},
                    },
                    "unevaluatedProperties": False,
                }
            },
            "responses": {"Gone": {"content": {"application/problem+json": {"schema": {"type": "object"}}}}},
        },
    },
)
GOOD = {"name": "a"}


def seen(**changes):
    """What a checker says of one exchange that is right but for the changes."""
    url, sent = changes.pop("url", "/things/1"), changes.pop("sent", GOOD)
    answer = {"status": 200, "body": GOOD, "content_type": "application/json"} | changes
    checker = Checker(document=DOCUMENT)
    checker.see(
        Exchange(
            method="PUT",
            url=url,
            request_body=b"" if sent is None else json.dumps(sent).encode(),
            **answer | {"body": json.dumps(answer["body"]).encode()},
        )
    )
    return checker


def test_an_exchange_that_keeps_to_the_document_counts_as_an_operation() -> None:
    """No violation, and the operation is among the accepted ones; a slash at the end means nothing."""
    checker = seen(url="/things/1/?count=2")
    assert ([], {"putThing"}) == (checker.unexplained, checker.accepted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"body": {}}, "answer 200: $ 'name' is a required property", id="answer lacks a field"),
        pytest.param({"body": {"name": 1}}, "answer 200: $.name 1 is not of type", id="answer's type"),
        pytest.param({"body": {**GOOD, "x": 1}}, "Unevaluated properties", id="unknown field"),
        pytest.param({"body": {**GOOD, "made": "today"}}, "is not a 'date-time'", id="a time's form"),
        pytest.param({"status": 500}, "status 500 is not listed", id="status"),
        pytest.param({"content_type": "text/plain"}, "text/plain, listed are", id="content type"),
        pytest.param({"sent": {"x": 1}}, "request: $ 'name' is a required", id="accepted and forbidden"),
        pytest.param({"sent": None}, "request: no body", id="accepted without a body"),
        pytest.param({"url": "/things/1?count=0"}, "query count: $ 0 is less than", id="query"),
        pytest.param({"url": "/things/1?size=1"}, "query size is not in the document", id="unknown query"),
        pytest.param({"url": "/others/1"}, "is not in the document", id="unknown path"),
    ],
)
def test_what_breaks_the_document_is_found(changes, words) -> None:
    """One violation that says what and where."""
    found = seen(**changes).unexplained
    assert found
    assert all(words in text or "Unevaluated" in text for text in found)


def test_a_refused_request_may_be_wrong() -> None:
    """Its body is not looked at; its answer is."""
    refused = {"status": 404, "content_type": "application/problem+json", "sent": {"x": 1}}
    assert [] == seen(**refused).unexplained
    assert [] != seen(**refused | {"body": []}).unexplained
