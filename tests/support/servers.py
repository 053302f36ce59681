"""Web and S3 servers on this machine that misbehave on request, as fixtures."""

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shared.files.client
import shared.files.connect
from shared.files.remote import RemoteFiles

DATA = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()


SIZE = len(DATA)


class Server(ThreadingHTTPServer):
    """A web server with byte ranges, in front of its own objects or of another server. Each request takes the next
    fault, if there is one."""

    daemon_threads = True

    def __init__(self, upstream: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.objects = {"/bucket/file": DATA}
        self.faults: deque[str] = deque()
        self.always = ""
        self.of_each: tuple[str, ...] = ()
        """Faults for the first requests of every kind."""
        self.requests: list[str] = []
        self.authorization = ""
        self.closing = threading.Event()

    def next_fault(self, command: str, line: str) -> str:
        if command == "HEAD":
            return ""
        if self.faults:
            return self.faults.popleft()
        before = self.requests.count(line) - 1
        return self.of_each[before] if before < len(self.of_each) else self.always

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None: ...

    def answer(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        line = f"{self.command} {self.path} {self.headers.get('Range', '')}".strip()
        server.requests.append(line)
        server.authorization = self.headers.get("Authorization", "")
        fault = server.next_fault(self.command, line)
        if fault == "refuse":
            self.close_connection = True
        elif fault.isdigit():
            self.send(int(fault), {}, b"<Error><Code>SomeCode</Code></Error>")
        else:
            self.send(*(self.forward(body) if server.upstream else self.own()), fault)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        with closing(HTTPConnection(self.server.upstream.removeprefix("http://"), timeout=30)) as upstream:
            upstream.request(self.command, self.path, body, dict(self.headers))
            response = upstream.getresponse()
            headers = {
                key: value for key, value in response.getheaders() if key not in ("Content-Length", "Connection")
            }
            return response.status, headers, response.read()

    def own(self) -> tuple[int, dict[str, str], bytes]:
        data = self.server.objects.get(self.path)
        if data is None:
            return 404, {}, b""
        headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "ETag": '"x"'}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            if first > last:
                return 416, headers, b""
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return 206, headers, data[first : last + 1]
        return 200, headers, data

    def send(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        if fault == "drop":  # done, but nobody hears of it
            self.close_connection = True
            return
        length = len(body)
        if fault in ("short", "cut"):
            body = body[: length // 2]
            length = len(body)
        first = int(re.sub(r"\D*(\d*).*", r"\1", headers.get("Content-Range", "0")) or 0)
        changed = {
            "cut": f"bytes {first}-{first + length - 1}/{SIZE}",
            "shift": f"bytes {first + 1}-{first + length}/{SIZE}",
            "longer": f"bytes {first}-{first + length - 1}/{SIZE + 1}",
        }
        if fault in changed:
            headers["Content-Range"] = changed[fault]
        if fault == "no ranges":
            status, headers, body = 200, {}, DATA
            length = SIZE
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: length // 2] if fault in ("kill", "stall") else body)
        if fault in ("kill", "stall"):
            self.server.closing.wait(30 if fault == "stall" else 0)
            self.close_connection = True


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's counts, and nothing waits long."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "SAGSAE_")) or name.lower() in (
            "http_proxy",
            "https_proxy",
            "all_proxy",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws_config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws_credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("SAGSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shared.files.client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(shared.files.connect, "BACKOFF_SECONDS", 0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    yield from serve(Server())


def serve(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The address of an S3 server in a process of its own."""
    command = [sys.executable, "-m", "moto.server", "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            address = next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            threading.Thread(target=deque, args=(lines, 0), daemon=True).start()  # a full pipe would stop the server
            yield address
        finally:
            process.kill()


@pytest.fixture
def front(moto: str) -> Iterator[Server]:
    """A server in front of the S3 server, for faults and for counting."""
    yield from serve(Server(moto))


@pytest.fixture
def s3(front: Server, monkeypatch: pytest.MonkeyPatch) -> RemoteFiles:
    """An empty prefix of a new bucket."""
    keys(monkeypatch, front)
    bucket = f"bucket-{time.monotonic_ns()}"
    with closing(HTTPConnection(front.upstream.removeprefix("http://"))) as connection:
        connection.request("PUT", f"/{bucket}")
        assert connection.getresponse().status == 200
    return RemoteFiles.connect(f"s3://{bucket}/some/prefix")


def keys(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
