"""A stand-in for an OpenAI-compatible server, on loopback."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Act = Callable[["EndpointHandler"], None]
"""What a server does instead of answering."""


class EndpointStub(ThreadingHTTPServer):
    """Answers with what `answer` returns for the body of a request: the text of a message, or an act."""

    daemon_threads = True

    def __init__(self, answer: Callable[[Body], "str | Act"]) -> None:
        super().__init__(("127.0.0.1", 0), EndpointHandler)
        self.answer = answer
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class EndpointHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: EndpointStub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.guard:
            self.server.bodies.append(body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.server.paths.append(self.path)
        found = self.server.answer(body)
        if isinstance(found, str):
            self.send(200, completion(found))
        else:
            found(self)

    def do_GET(self) -> None:
        with self.server.guard:
            self.server.paths.append(self.path)
        self.send(405, b"{}")

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def completion(text: str) -> bytes:
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    message = {"role": "assistant", "content": text}
    answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "stub", "usage": usage,
              "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
    return json.dumps(answer).encode()


@contextmanager
def served(answer: Callable[[Body], "str | Act"]) -> Iterator[EndpointStub]:
    server = EndpointStub(answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def kind_of(body: Body) -> str:
    """The kind of question in a request."""
    system, user = (message["content"] for message in body["messages"])
    if "Pole A:" in user:
        return "poles"
    if user.startswith("Explanation:"):
        return "detection" if "anywhere in it" in system else "fuzz"
    return "explain"


def status(code: int, **headers: str) -> Act:
    return lambda handler: handler.send(code, b'{"error": {"message": "not now", "code": "x"}}', **headers)


def raw(body: bytes) -> Act:
    return lambda handler: handler.send(200, body)


def hang_up(handler: EndpointHandler) -> None:
    handler.close_connection = True


def half(handler: EndpointHandler) -> None:
    """Announces more than it sends."""
    body = completion("[1, 0, 1, 0, 1]")
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True
