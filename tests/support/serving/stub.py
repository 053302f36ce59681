"""A small service on this machine that answers as `sagsae serve` does, and misbehaves on request."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from shared.files.local import LocalFiles


class Reply(NamedTuple):
    """What the service sends. With `length`, that length is announced instead of the body's."""

    status: int
    body: bytes
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)
    length: int | None = None


class Asked(NamedTuple):
    method: str
    path: str
    authorization: str
    body: Any
    range: str


Route = Callable[["ServiceStub", Asked, "re.Match[str]"], Reply]


class ServiceStub(ThreadingHTTPServer):
    """Serves the stores of a folder, grants leases, and answers everything else as `routes` say."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path, token: str = "", port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.root, self.token = root, token
        self.asked: list[Asked] = []
        self.leases: dict[str, str] = {}
        self.granted: list[str] = []
        self.sent: dict[str, list[int]] = {}
        """Lengths of the answers, by path."""
        self.connections: list[socket.socket] = []
        self.routes: dict[str, Route] = {}
        """By `METHOD PATTERN`; they come before what the service does by itself."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def store_url(self, name: str) -> str:
        return f"{self.url}/v1/stores/{name}"

    def on(self, pattern: str, reply: Reply | Route) -> None:
        self.routes[pattern] = reply if callable(reply) else lambda *_: reply

    def reply(self, asked: Asked) -> Reply:
        for pattern, route in self.routes.items():
            if found := re.fullmatch(pattern, f"{asked.method} {asked.path}"):
                return route(self, asked, found)
        return self.served(asked)

    def served(self, asked: Asked) -> Reply:
        """What the service does by itself."""
        line = f"{asked.method} {asked.path}"
        if self.token and asked.authorization != f"Bearer {self.token}":
            return refusal(401, "token", "the token is missing or wrong")
        if found := re.fullmatch(r"GET /v1/stores/([\w.-]+)/files/(.+)", line):
            return self.file(self.root / found[1], found[2], asked.range)
        if found := re.fullmatch(r"GET /v1/stores/([\w.-]+)/logs", line):
            marks = LocalFiles(self.root / found[1]).marks("manifest", "")
            return as_json(200, [{"path": path, **mark._asdict()} for path, mark in marks.items()])
        if found := re.fullmatch(r"POST /v1/stores/([\w.-]+)/leases", line):
            number = f"lease-{len(self.granted)}"
            self.leases[number] = found[1]
            self.granted.append(number)
            return as_json(201, {"id": number, "store": found[1], "ttl_s": asked.body["ttl_s"]})
        if found := re.fullmatch(r"(PUT|DELETE) /v1/leases/([\w-]+)", line):
            if found[2] not in self.leases:
                return refusal(410, "lapsed", f"lease {found[2]}: has run out. Take a new one")
            if found[1] == "DELETE":
                del self.leases[found[2]]
            return Reply(204, b"")
        return refusal(404, "unknown", f"there is nothing at {asked.path}")

    def file(self, store: Path, path: str, range_: str) -> Reply:
        try:
            data = (store / path).read_bytes()
        except OSError:
            return refusal(404, "unknown", f"{path}: is no file of this store")
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", range_)
        assert found is not None, "files are asked for by range"
        first, last = int(found[1]), min(int(found[2]), len(data) - 1)
        if first > last:
            return Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return Reply(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, client = super().get_request()
        self.connections.append(connection)
        return connection, client

    def kill(self) -> None:
        """Ends as a killed process does: connections are cut, the port is free."""
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ServiceStub

    def log_message(self, format: str, *args: Any) -> None: ...

    def answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(data) if data else None
        asked = Asked(
            self.command, self.path, self.headers.get("Authorization", ""), body, self.headers.get("Range", "")
        )
        self.server.asked.append(asked)
        reply = self.server.reply(asked)
        self.server.sent.setdefault(self.path, []).append(len(reply.body))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.status != 204:
            self.send_header("Content-Length", str(len(reply.body) if reply.length is None else reply.length))
        self.end_headers()
        self.wfile.write(reply.body)
        self.close_connection |= reply.length is not None

    do_GET = do_PUT = do_DELETE = do_POST = answer


def as_json(status: int, value: Any) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def refusal(status: int, code: str, message: str) -> Reply:
    return as_json(status, {"error": {"code": code, "message": message}})


@contextmanager
def serving(root: Path, token: str = "", port: int = 0) -> Iterator[ServiceStub]:
    """A service for the time of the block."""
    server = ServiceStub(root, token, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.kill()
