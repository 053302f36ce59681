"""Answers the browser: the page's files, and questions to the language model, one at a time."""

import json
import re
import select
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from secrets import token_urlsafe
from socketserver import TCPServer
from typing import Any, Final
from urllib.parse import urlsplit

from shared.errors import DamagedError, UserError
from shared.files.local import read_whole
from shared.gate import BadData, parse_json
from shared.progress import say
from shared.schema import build
from shared.schemas.view import MOST_CHARACTERS, MOST_DIAL, MOST_NEW_TOKENS, EncodeQuestion, SteerQuestion
from train.features.site.build import page_files
from train.view.doors import BODY_BYTES, HEADERS, Refusal, check_host, check_question
from train.view.live import LiveModel

LOOPBACK: Final = "127.0.0.1"
WAITING: Final = 8
"""Questions that wait for the model, at most."""
LOOK_S: Final = 0.1
"""Seconds between looks at whether the browser of a waiting question is still there."""
CONNECTIONS: Final = 64
"""Connections at a time; more are closed."""
SILENT_S: Final = 30
"""Seconds after which a connection that neither sends nor reads is closed."""
FILE_BYTES: Final = 1 << 28
"""Bytes of a file of the page, at most."""
DATA: Final = re.compile(r"data/(index|latents/\d{5,9}|tokens/\d\d)\.js")
"""Files that are read from the folder. The others are those of this version."""
QUESTIONS: Final[Mapping[str, type[SteerQuestion] | type[EncodeQuestion]]] = {
    "/api/steer": SteerQuestion,
    "/api/encode": EncodeQuestion,
}
KINDS: Final = {"html": "text/html", "js": "text/javascript", "css": "text/css"}


class Gone(Exception):
    """The browser does not wait for its answer."""


class ModelQueue:
    """Lets one question at a time to the model."""

    def __init__(self) -> None:
        self.places, self.lock = threading.Semaphore(1 + WAITING), threading.Lock()

    @contextmanager
    def turn(self, given_up: Callable[[], bool]) -> Iterator[None]:
        """Waits until no other question is answered. Raises Refusal 503 when too many wait, Gone when the browser gives
        up meanwhile."""
        if not self.places.acquire(blocking=False):
            raise Refusal(503, f"{WAITING} questions wait already. Ask again in a few seconds")
        try:
            while not self.lock.acquire(timeout=LOOK_S):
                if given_up():
                    raise Gone
            try:
                yield
            finally:
                self.lock.release()
        finally:
            self.places.release()


@dataclass(frozen=True)
class ServedPage:
    """What a server shows."""

    folder: Path
    """RUN/features/NAME."""
    live: LiveModel | None
    missing: str
    """Why there is no model, in one sentence."""

    def about(self) -> dict[str, Any]:
        """The answer to GET /api/about."""
        return {
            "live": self.live is not None,
            "missing": self.missing,
            "most_new_tokens": MOST_NEW_TOKENS,
            "most_characters": MOST_CHARACTERS,
            "most_dial": MOST_DIAL,
        }


class ViewServer(ThreadingHTTPServer):
    """The server of one page, on the loopback address. A thread for each connection."""

    request_queue_size = CONNECTIONS

    def __init__(self, page: ServedPage, port: int) -> None:
        """Listens. Raises OSError when it cannot."""
        self.page, self.queue, self.key = page, ModelQueue(), token_urlsafe(24)
        self.ending, self.connections = threading.Event(), threading.Semaphore(CONNECTIONS)
        self.files = page_files()
        super().__init__((LOOPBACK, port), ViewHandler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # that of HTTPServer asks for the address's name
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    @property
    def url(self) -> str:
        """The address of the page, with the key."""
        return f"http://{LOOPBACK}:{self.server_port}/?key={self.key}"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # else the browser went away
            super().handle_error(request, client_address)

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serves in a thread, and yields the address. At the end answers that are being written stop."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": LOOK_S}, daemon=True)
        thread.start()
        try:
            yield self.url
        finally:
            self.ending.set()
            self.shutdown()
            thread.join()
            self.queue.lock.acquire(timeout=SILENT_S)  # an interpreter must not end inside a pass of the model


class ViewHandler(BaseHTTPRequestHandler):
    """Answers one request. HTTP/1.0: a connection has one, and an answer ends with it."""

    server: ViewServer
    timeout = SILENT_S
    server_version, sys_version = "sagsae", ""

    def do_GET(self) -> None:
        self.answered(self.get)

    def do_POST(self) -> None:
        self.answered(self.post)

    def answered(self, answer: Callable[[], None]) -> None:
        """Sends an answer, or why there is none."""
        try:
            check_host(self.headers, self.server.server_port)
            answer()
        except Refusal as refusal:
            self.refuse(refusal.status, refusal.words)
        except (Gone, OSError):
            pass

    def get(self) -> None:
        path = urlsplit(self.path).path.lstrip("/") or "index.html"
        if path == "api/about":
            self.send(json.dumps(self.server.page.about()).encode(), "application/json")
            return
        data = self.server.files.get(path)
        if data is None:
            data = self.data_file(path)
        self.send(data, KINDS[path.rpartition(".")[2]])

    def data_file(self, path: str) -> bytes:
        """A file of the folder. Raises Refusal 404 for anything but the page's data."""
        folder = self.server.page.folder
        missing = Refusal(404, "there is nothing at this address")
        if not DATA.fullmatch(path) or not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise missing
        try:
            return read_whole(folder / path, FILE_BYTES)
        except (OSError, DamagedError) as error:
            raise missing from error

    def post(self) -> None:
        length = check_question(self.headers, self.server.key)
        if self.path not in QUESTIONS:
            raise Refusal(404, "there is nothing at this address")
        asked = question(QUESTIONS[self.path], self.rfile.read(length))
        live = self.server.page.live
        if live is None:
            raise Refusal(404, self.server.page.missing)
        with self.server.queue.turn(self.given_up):
            try:
                if isinstance(asked, SteerQuestion):
                    self.stream(live.steer(asked))
                else:
                    self.send(json.dumps(live.encode(asked)).encode(), "application/json")
            except (UserError, DamagedError) as error:
                raise Refusal(400, sentence(error)) from error
            except (MemoryError, RuntimeError) as error:
                say(f"a question failed: {sentence(error)}")
                raise Refusal(500, sentence(error)) from error

    def stream(self, lines: Generator[dict[str, Any], None, None]) -> None:
        """Sends lines as they come (NDJSON). Stops when the browser gives up. Raises UserError when there is no first
        line."""
        with closing(lines):
            first = next(lines)
            self.head(200, "application/x-ndjson")
            self.line(first)
            try:
                for each in lines:
                    self.line(each)
                    if self.given_up():
                        return
            except (UserError, DamagedError, MemoryError, RuntimeError) as error:
                self.line({"error": sentence(error)})

    def line(self, content: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(content).encode() + b"\n")

    def given_up(self) -> bool:
        """Whether the browser closed the connection, or the server is about to end."""
        if self.server.ending.is_set():
            return True
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def send(self, data: bytes, kind: str, status: int = 200) -> None:
        self.head(status, kind, len(data))
        self.wfile.write(data)

    def head(self, status: int, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind if kind.startswith("application/") else f"{kind}; charset=utf-8")
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def refuse(self, status: int, words: str) -> None:
        """Sends one sentence. Reads what was sent first, or the browser would see a broken connection instead."""
        with suppress(OSError):
            self.send(json.dumps({"error": words}).encode(), "application/json", status)
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            left = 8 * BODY_BYTES
            while left > 0 and (part := self.connection.recv(1 << 16)):
                left -= len(part)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """What the library refuses: a method that is not here, a line or headers that are too long."""
        self.refuse(code, message or "this is no request that is answered here")

    def log_message(self, *_: Any) -> None:
        """Prints nothing: a log would hold prompts."""


def question(schema: type[SteerQuestion] | type[EncodeQuestion], body: bytes) -> SteerQuestion | EncodeQuestion:
    """The question in a body. Raises Refusal 400 for anything else."""
    try:
        values = parse_json(body, BODY_BYTES)
        if not isinstance(values, dict):
            raise BadData("is no JSON object")
        return build(schema, values)
    except BadData as error:
        raise Refusal(400, f"the question {error}") from error
    except UserError as error:
        raise Refusal(400, sentence(error)) from error


def sentence(error: Exception) -> str:
    """A message without the dashes of the option that it begins with."""
    return (str(error).splitlines() or [type(error).__name__])[0].removeprefix("--")[:1000]
