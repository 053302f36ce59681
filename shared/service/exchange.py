"""One request to the service and its answer, over a connection that is kept: bounded in time and in bytes.

Whatever answers may be hostile or broken. No redirect is followed, no proxy is asked, no byte beyond the limit is
read, and an answer that drips in too slowly is given up.
"""

import http.client
import io
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from functools import partial
from multiprocessing.connection import wait
from typing import Any, Final, NamedTuple

from shared.errors import BusyError, UserError
from shared.gate import BadData, parse_json, printable, quoted
from shared.progress import say
from shared.refusals import REFUSALS, RefusedError
from shared.service.address import SERVICE, TOKEN, TOKEN_FILE, ServiceAddress

CONNECT_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 30.0
"""Timeout of a whole answer, beyond the time that the server was asked to wait."""
STALL_SECONDS: Final = 12.0
"""An answer fails when nothing arrives for this long."""
PATIENCE_SECONDS: Final = 20.0
"""Seconds during which a request that may be repeated is tried again."""
SAY_SECONDS: Final = 3.0
"""Seconds without an answer after which a line says that the service is away."""
BACKOFF_SECONDS: Final = 0.2
LONGEST_PAUSE: Final = 5.0
ANSWER_BYTES: Final = 16 << 20
ERROR_BYTES: Final = 64 << 10
SENTENCE: Final = 2000
"""Characters of a server's sentence that a message repeats."""
PASSING: Final = (429, 502, 503, 504)
"""Statuses after which the same request can succeed soon."""
IDLE: Final = 8
"""Connections that are kept for later requests."""


class UnavailableError(BusyError):
    """The service cannot be reached, is busy, has no space, or is broken. `status` is None when nothing answered."""

    def __init__(self, message: str, status: int | None = None, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class ServiceAnswer(NamedTuple):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    """By name, in small letters."""
    body: bytes


class TimedReader(io.RawIOBase):
    """The incoming bytes of a socket until a moment; later reads raise TimeoutError, however the bytes drip in. `stall`
    bounds one read in seconds."""

    def __init__(self, connected: socket.socket, end: float, stall: float) -> None:
        self.connected, self.end, self.stall = connected, end, stall
        self.raw = connected.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer took too long")
        self.connected.settimeout(min(left, self.stall))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


class TimedSocket:
    """What http.client's response reads from: a socket whose bytes must come before `end`."""

    def __init__(self, connected: socket.socket, end: float, stall: float) -> None:
        self.connected, self.end, self.stall = connected, end, stall

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(TimedReader(self.connected, self.end, self.stall))


def timed_response(
    end: float, stall: float, connected: socket.socket, *args: Any, **options: Any
) -> http.client.HTTPResponse:
    return http.client.HTTPResponse(TimedSocket(connected, end, stall), *args, **options)  # type: ignore[arg-type]


class Exchange:
    """The connections to one service. Any thread may use it; connections are kept between requests."""

    def __init__(
        self,
        address: ServiceAddress,
        token: str | None,
        seconds: float = ANSWER_SECONDS,
        patience: float | None = None,
    ) -> None:
        """`seconds` bounds one answer; `patience` is how long a request that may be repeated is tried again."""
        self.address, self.token, self.seconds = address, token, seconds
        self.patience = PATIENCE_SECONDS if patience is None else patience
        self.idle: list[http.client.HTTPConnection] = []
        self.guard = threading.Lock()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        most: int = ANSWER_BYTES,
        wait: float = 0.0,
        again: bool = True,
        headers: Mapping[str, str] | None = None,
        fine: tuple[int, ...] = (),
    ) -> ServiceAnswer:
        """Sends one request and returns the answer when its status is 2xx or in `fine`. `most` bounds the body, `wait`
        is the time that the server may hold the request back, `again` says that the request may be repeated.

        Raises RefusedError for another status below 500, UnavailableError for the rest, and UserError for an answer
        that no service of ours gives."""
        started, pause, said = time.monotonic(), BACKOFF_SECONDS, False
        while True:
            try:
                answer = self.once(method, path, body, most, wait, headers or {})
                return answer if answer.status in fine else self.judged(answer, method, path)
            except UnavailableError as error:
                passed = time.monotonic() - started
                passing = error.status is None or error.status in PASSING
                if not again or not passing or passed + pause > self.patience:
                    raise
                if passed > SAY_SECONDS and not said:
                    said = True
                    say(f"{error}. Trying again for {self.patience:.0f} s")
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)

    def once(
        self, method: str, path: str, body: Any, most: int, wait: float, headers: Mapping[str, str]
    ) -> ServiceAnswer:
        """One try. Raises UnavailableError when no whole answer came."""
        end = time.monotonic() + self.seconds + wait
        try:
            line = self.connection(min(CONNECT_SECONDS, self.seconds))
        except (OSError, ValueError) as error:
            raise self.unreachable(error) from error
        try:
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
            line.response_class = partial(timed_response, end, STALL_SECONDS + wait)  # type: ignore[assignment]
            line.request(method, self.address.base + path, data, dict(self.headers(data, headers)))
            response = line.getresponse()
            answer = ServiceAnswer(response.status, lowered(response), self.whole(response, most))
            self.keep(line, response)
            return answer
        except (OSError, http.client.HTTPException) as error:
            line.close()
            raise self.unreachable(error) from error
        except BaseException:
            line.close()
            raise

    def headers(self, data: bytes | None, more: Mapping[str, str]) -> Mapping[str, str]:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "sagsae"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return headers | dict(more)

    def connection(self, seconds: float) -> http.client.HTTPConnection:
        """A kept connection that the server has not closed, or a new one."""
        while True:
            with self.guard:
                line = self.idle.pop() if self.idle else None
            if line is None:
                break
            if line.sock is not None and not wait([line.sock], 0):
                line.sock.settimeout(seconds)
                return line
            line.close()
        host, port = self.address.host, self.address.port
        if self.address.secure:
            line = http.client.HTTPSConnection(host, port, timeout=seconds, context=ssl.create_default_context())
        else:
            line = http.client.HTTPConnection(host, port, timeout=seconds)
        line.connect()
        return line

    def whole(self, response: http.client.HTTPResponse, most: int) -> bytes:
        """The body. Raises UserError, before it is read, when it is announced larger than the limit."""
        most = most if response.status < 300 else min(most, ERROR_BYTES)
        if (response.length or 0) > most:
            raise UserError(
                f"{self.address.url}: announces an answer of {response.length:,} bytes; {self.at_most(most)}"
            )
        body = response.read(most + 1)
        if len(body) > most:
            raise UserError(f"{self.address.url}: sends an answer without end; {self.at_most(most)}")
        if response.length:
            raise http.client.IncompleteRead(body, response.length)
        return body

    def at_most(self, most: int) -> str:
        return f"at most {most:,} are expected. Check that sagsae serve answers there"

    def keep(self, line: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        with self.guard:
            if not response.will_close and response.isclosed() and len(self.idle) < IDLE:
                self.idle.append(line)
                return
        line.close()

    def close(self) -> None:
        """Closes the kept connections."""
        with self.guard:
            lines, self.idle = self.idle, []
        for line in lines:
            line.close()

    def __del__(self) -> None:
        for line in self.idle:
            line.close()

    def unreachable(self, error: Exception) -> UnavailableError:
        words = printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
        if isinstance(error, ssl.SSLCertVerificationError):
            words = "its certificate is not trusted; SSL_CERT_FILE names a file of the authorities to trust"
        return UnavailableError(
            f"{self.address.url}: the service cannot be reached ({words}). Check the address ({SERVICE}, --service), "
            "and that sagsae serve runs there"
        )

    def judged(self, answer: ServiceAnswer, method: str, path: str) -> ServiceAnswer:
        """The answer, when it is one that helps. Raises the error that stands for any other status."""
        status = answer.status
        if 200 <= status < 300:
            return answer
        url = self.address.url
        if status < 400:
            raise RefusedError(
                f"{url}: answers with a redirect ({status}), which is not followed. Give the service's own address"
            )
        code, sentence = spoken(answer)
        if status == 401 or (status == 403 and not sentence):
            raise RefusedError(self.about_token(status, sentence))
        if status >= 500 or status == 429:
            raise UnavailableError(sentence or f"{url}: is busy or broken (status {status})", status, code)
        if not sentence:
            raise RefusedError(f"{url}: refuses {method} {path} ({status}). Check that sagsae serve answers there")
        raise REFUSALS.get(code, RefusedError)(sentence)

    def about_token(self, status: int, sentence: str) -> str:
        if self.token is None:
            return (
                f"{self.address.url}: needs a token. Set {SERVICE}={self.address.url}, and {TOKEN} to the token or "
                f"{TOKEN_FILE} to a file that holds it"
            )
        if status != 401 and sentence:
            return sentence
        what = "does not know the token" if status == 401 else "does not allow this with the token"
        return f"{self.address.url}: {what} in {TOKEN} or {TOKEN_FILE}. Ask who runs the service for another"


def lowered(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}


def spoken(answer: ServiceAnswer) -> tuple[str, str]:
    """The code and the sentence of an error, each empty where the answer has none of ours."""
    try:
        error = parse_json(answer.body, ERROR_BYTES)["error"]
        code, message = error.get("code", ""), error["message"]
    except (BadData, KeyError, TypeError, AttributeError):
        return "", ""
    if not isinstance(code, str) or not isinstance(message, str):
        return "", ""
    return printable(code)[:64], printable(" ".join(message.split()))[:SENTENCE]


def json_of(answer: ServiceAnswer, place: str, most: int = ANSWER_BYTES) -> Any:
    """The JSON of an answer, with every text made printable. Raises UserError when it is none."""
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UserError(
            f"{place}: answers with {quoted(kind or 'no content type', 60)} instead of JSON. Check that sagsae serve "
            "answers there"
        )
    try:
        return cleaned(parse_json(answer.body, most))
    except BadData as error:
        raise UserError(f"{place}: the answer {error}. Check that sagsae serve answers there") from error


def cleaned(value: Any) -> Any:
    """The same document, with texts that no terminal obeys."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if isinstance(value, dict):
        return {printable(name): cleaned(item) for name, item in value.items()}
    return value
