"""A vendor on loopback by a table of paths, with what was asked remembered."""

import json
from contextlib import contextmanager
from dataclasses import dataclass

from gpubroker.testing import Answer, serving


@dataclass
class Vendor:
    """A running server and the requests it has seen."""

    url: str
    asked: list


def ok(body):
    """The body as JSON, with status 200."""
    return Answer(body=json.dumps(body))


@contextmanager
def vendor(answers):
    """Serve {(method, path): Answer or function(request) -> Answer}; anything else is a 404."""
    asked = []

    def respond(request):
        asked.append(request)
        answer = answers.get((request.method, request.path), Answer(status=404, body="not here"))
        return answer(request) if callable(answer) else answer

    with serving(respond) as url:
        yield Vendor(url, asked)
