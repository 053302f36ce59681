"""One question to an OpenAI-compatible server: bounded in time, in bytes and in tries.

The server may be hostile or broken. The key goes to its address alone: no redirect is followed, and no message holds
the key.
"""

import email.utils
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Event
from typing import Any, Final, TypeVar

from shared.errors import UserError
from shared.gate import BadData, members, parse_json, printable, quoted
from shared.service.address import ServiceAddress, parse_service
from shared.service.exchange import CONNECT_SECONDS, Exchange, ServiceAnswer, UnavailableError, spoken

PATH: Final = "/chat/completions"
VERSION_PATH: Final = "/v1"
RETRIES: Final = 3
"""Times that a call is repeated after a failure."""
PAUSE_SECONDS: Final = 1.0
"""Pause before the first repetition, doubled before every further one."""
LONGEST_PAUSE: Final = 60.0
"""Longest pause that a server can ask for."""
ANSWER_BYTES: Final = 1 << 20
ANSWER_CHARACTERS: Final = 100_000
MOST_COUNTED: Final = 1 << 32
SENTENCE: Final = 300
KEY: Final = re.compile(r"[\x21-\x7e]{1,4096}")
PASSING: Final = (408, 409, 425, 429)
"""Statuses below 500 after which the same call can succeed."""
HOPELESS: Final = (401, 403, 404, 405)
"""Statuses after which no other call can succeed, either."""
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
Value = TypeVar("Value")


class CallFailed(Exception):
    """A call that got no usable answer, and will get none by being repeated."""


class PassingFailure(Exception):
    """One try that got no usable answer. `pause`: seconds that the server asks to wait; None: it does not say."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True)
class CallAnswer:
    """What a model answered, and the tokens that the server counted; 0 where it does not say."""

    text: str
    prompt_tokens: int
    answer_tokens: int


class EndpointExchange(Exchange):
    """Connections to an endpoint, with words for the person who named it."""

    def unreachable(self, error: Exception) -> UnavailableError:
        words = printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
        return UnavailableError(f"cannot be reached, or broke off ({words})")

    def at_most(self, most: int) -> str:
        return f"at most {most:,} are read"


class ChatEndpoint:
    """A server that answers chat completions. Any thread may ask it."""

    def __init__(self, url: str, key: str | None, seconds: float) -> None:
        """Sends nothing. `seconds`: timeout of one answer. Raises UserError for a URL that cannot be used, and for a
        key that would travel unencrypted."""
        if "@" in url:
            raise UserError("--endpoint: a URL here has no user and no password. Put the key into the variable")
        self.address = endpoint_address(url)
        if key and not self.address.secure and self.address.host not in LOOPBACK:
            raise UserError(f"--endpoint {self.url}: the key would travel unencrypted. Use https, or unset the key")
        self.key = key
        self.stopped = Event()
        """Set: no further call is made, and pauses end."""
        connect = min(CONNECT_SECONDS, seconds)
        self.wait = seconds - connect
        self.exchange = EndpointExchange(self.address, key, connect)

    @property
    def url(self) -> str:
        return self.address.url

    def close(self) -> None:
        self.exchange.close()

    def ask(self, body: Mapping[str, Any], read: Callable[[str], Value]) -> tuple[Value, CallAnswer]:
        """Sends a question until `read` accepts the answer, at most 1 + RETRIES times. Raises CallFailed, and UserError
        when no other question would be answered, either."""
        pause = PAUSE_SECONDS
        for retry in range(RETRIES + 1):
            if self.stopped.is_set():
                break
            try:
                answer = self.once(body)
                return checked_answer(answer, read), answer
            except PassingFailure as error:
                if retry == RETRIES:
                    raise CallFailed(f"{RETRIES + 1} tries failed, the last one because {self.hidden(error)}") from None
                self.stopped.wait(pause if error.pause is None else min(error.pause, LONGEST_PAUSE))
                pause *= 2
        raise CallFailed("stopped")

    def once(self, body: Mapping[str, Any]) -> CallAnswer:
        """One try."""
        try:
            answer = self.exchange.once("POST", self.path, body, ANSWER_BYTES, self.wait, {})
        except (UnavailableError, UserError) as error:  # UserError: an answer larger than is read
            raise PassingFailure(f"{error}") from error
        if 200 <= answer.status < 300:
            try:
                return answer_in(answer.body)
            except BadData as error:
                raise PassingFailure(f"the answer {error}") from error
        raise self.failure(answer)

    @property
    def path(self) -> str:
        return PATH if self.address.base.endswith(VERSION_PATH) else VERSION_PATH + PATH

    def failure(self, answer: ServiceAnswer) -> Exception:
        """The error that stands for a status."""
        status, (_, sentence) = answer.status, spoken(answer)
        words = f" ({self.hidden(sentence)})" if sentence else ""
        if status >= 500 or status in PASSING:
            return PassingFailure(f"it answers {status}{words}", retry_after(answer.headers))
        if 300 <= status < 400:
            return UserError(f"{self.url}: answers with a redirect ({status}), which is not followed. Give its own URL")
        if status in (401, 403):
            cure = "Check the key in the variable" if self.key else "Put a key into the variable of --key-variable"
            return UserError(f"{self.url}: does not let you in ({status}){words}. {cure}")
        if status in HOPELESS:
            return UserError(f"{self.url}: has no {self.path}, or no such model ({status}){words}. Check both")
        return CallFailed(f"it refuses the call ({status}){words}")

    def hidden(self, message: object) -> str:
        """A message without the key, which a server may repeat, in bounded length."""
        words = printable(str(message))
        return (words.replace(self.key, "…") if self.key else words)[:SENTENCE]


def endpoint_address(url: str) -> ServiceAddress:
    """The address above /chat/completions, with or without /v1. Raises UserError."""
    return parse_service(url.strip().rstrip("/").removesuffix(PATH), "--endpoint")


def key_in(variable: str) -> str | None:
    """The key in an environment variable; None without one. Raises UserError when it cannot be sent; no message repeats
    it."""
    key = os.environ.get(variable, "").strip()
    if key and not KEY.fullmatch(key):
        raise UserError(f"{variable}: expected one key of letters, digits and signs, no spaces")
    return key or None


def answer_in(body: bytes) -> CallAnswer:
    """Reads a chat completion. Raises BadData when it is none."""
    found = members(parse_json(body, ANSWER_BYTES), ("choices",), None)
    choices = found["choices"]
    if not isinstance(choices, list) or not choices:
        raise BadData(f"has choices {quoted(choices)}")
    message = members(members(choices[0], ("message",), None)["message"], ("content",), None)
    content = message["content"]
    if not isinstance(content, str):
        raise BadData(f"has the content {quoted(content)} instead of a text")
    usage = found.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return CallAnswer(
        content[:ANSWER_CHARACTERS], counted(counts.get("prompt_tokens")), counted(counts.get("completion_tokens"))
    )


def counted(value: Any) -> int:
    return value if type(value) is int and 0 <= value < MOST_COUNTED else 0


def checked_answer(answer: CallAnswer, read: Callable[[str], Value]) -> Value:
    try:
        return read(answer.text)
    except BadData as error:
        raise PassingFailure(f"the answer {error}") from error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the header Retry-After asks for, as a number or a date."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value[:64]).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
