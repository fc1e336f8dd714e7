"""A vendor on loopback: canned answers by method and path, with what was asked remembered."""

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What to send. `hang` sends nothing until the server closes; `drip_s` sends a byte at a time."""

    body: object = b""
    status: int = 200
    headers: dict = field(default_factory=dict)
    hang: bool = False
    drip: bool = False


@dataclass
class Vendor:
    """A running server."""

    url: str
    asked: list  # (method, path, headers, decoded body)


@contextmanager
def vendor(answers):
    """Serve `answers`: {(method, path): Answer | function(body) -> Answer}; anything else is a 404."""
    asked = []
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self):
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(raw) if raw else None
            path = self.path.split("?")[0]
            asked.append((self.command, self.path, dict(self.headers), body))
            answer = answers.get((self.command, path), Answer(b"not here", 404))
            if callable(answer):
                answer = answer(body)
            if answer.hang:
                closing.wait(30)
                return
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if answer.drip:
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    if closing.wait(0.05):
                        return
            else:
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = _serve  # noqa: N815

        def log_message(self, *args):
            pass

        def handle_one_request(self):
            try:
                super().handle_one_request()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield Vendor(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
