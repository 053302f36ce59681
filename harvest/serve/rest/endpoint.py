"""What every endpoint has: a path, a level of access, the shapes of its body and its answers.

The routes and the OpenAPI document are made from the same list of endpoints, so neither can say what the other does
not do.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from harvest.serve.planner import Planner
from harvest.serve.rest.events import Announcer
from harvest.serve.rest.open_stores import OpenStores
from harvest.serve.state import State
from shared.config import ServeConfig
from shared.errors import UserError
from shared.gate import BadData, named, parse_json
from shared.schema import Frozen, build

BODY_BYTES: Final = 64 << 10
"""Largest body of a request."""
BODY_SECONDS: Final = 30.0
"""Seconds in which a body must arrive."""
CALLER: Final = "sagsae.caller"
"""Where an ASGI scope holds the Caller."""


class Level(IntEnum):
    """What a caller may do. Each level includes those before it."""

    OPEN = 0
    """Ask whether the server is up."""
    READ = 1
    """See the catalog and the queue, read stores."""
    ASK = 2
    """Ask for activations: queue and cancel jobs, pin, lease and delete stores."""
    ADMIN = 3
    """Work on jobs, and delete what is pinned or leased."""


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    name: str
    """The level and eight digits of the token's digest; `local` where no token is needed."""
    level: Level
    here: bool = False
    """Whether the caller is a program on the server's machine."""


@runtime_checkable
class TokenBook(Protocol):
    """The tokens that open the server."""

    def find(self, token: str) -> Caller | None:
        """The caller that a token stands for."""
        ...


class HttpError(UserError):
    """A request that HTTP itself refuses: a status, a code for programs and a sentence for people."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


@dataclass
class Counters:
    """What /metrics counts since the start of the server."""

    answers: dict[int, int] = field(default_factory=dict)
    """Answers by status."""
    hits: int = 0
    misses: int = 0
    bytes_sent: int = 0
    """Bytes of stores' files."""
    streams: int = 0
    """Event streams that are open now."""


@dataclass
class Service:
    """Everything that endpoints work with."""

    state: State
    planner: Planner
    config: ServeConfig
    root: Path
    """The folder of stores, absolute."""
    stores: OpenStores
    announcer: Announcer
    tokens: "TokenBook | None" = None
    """The tokens that open the server; None: no caller needs one."""
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True)
class RestCall:
    """One request to an endpoint."""

    service: Service
    request: Request
    caller: Caller
    body: Any = None
    """The validated body, of the endpoint's class; None where it takes none."""

    @property
    def state(self) -> State:
        return self.service.state

    def path(self, name: str) -> str:
        """A part of the path."""
        return str(self.request.path_params[name])

    def number(self, name: str) -> int:
        """A number in the path. Raises HttpError (404) for anything else."""
        text = self.path(name)
        if not (text.isascii() and text.isdecimal() and len(text) < 16):
            raise HttpError(404, "unknown", f"{name} {text[:40]!r}: must be a number, such as 12")
        return int(text)

    def query(self, name: str) -> str | None:
        return self.request.query_params.get(name)

    def query_number(self, name: str, default: int, low: int, high: int) -> int:
        """A number of the query. Raises HttpError (422) outside of its bounds."""
        text = self.query(name)
        if text is None:
            return default
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 16 and low <= int(text) <= high):
            raise HttpError(422, "invalid", f"{name}={text[:40]}: must be a whole number from {low:,} to {high:,}")
        return int(text)


Handler = Callable[[RestCall], Awaitable[Response]]


@dataclass(frozen=True)
class Query:
    """A parameter of a query."""

    name: str
    schema: Mapping[str, Any]
    text: str


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    handler: Handler
    level: Level
    summary: str
    body: type[Frozen] | None = None
    answers: Mapping[int, Any] = field(default_factory=dict)
    """By status: a pydantic class, a JSON schema, or the media type of anything else."""
    queries: tuple[Query, ...] = ()
    errors: tuple[int, ...] = ()
    """Further statuses whose body is an error."""


async def read_body(request: Request, most: int = BODY_BYTES) -> bytes:
    """The whole body. Raises HttpError when it is too large (413) or too slow (408)."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > most:
                    raise too_large(most)
    except TimeoutError as error:
        raise HttpError(408, "slow", f"the body did not arrive within {BODY_SECONDS:.0f} s. Send it again") from error
    return bytes(data)


def too_large(most: int) -> HttpError:
    message = f"the body has more than {most:,} bytes; no request of ours is as long. Send less"
    return HttpError(413, "too_large", message, {"Connection": "close"})


def parse_body(data: bytes, schema: type[Frozen]) -> Frozen:
    """The body as an object of the schema. Raises HttpError: 400 where it is no JSON object, 422 where a member is
    wrong."""
    try:
        value = parse_json(data or b"{}", BODY_BYTES)
        json.dumps(value, ensure_ascii=False).encode()
    except (BadData, UnicodeEncodeError) as error:
        what = "has halves of characters" if isinstance(error, UnicodeEncodeError) else str(error)
        raise HttpError(400, "not_json", f"the body {what}. Send one JSON object in UTF-8") from error
    if not isinstance(value, dict):
        raise HttpError(400, "not_json", f"the body is a {type(value).__name__}. Send one JSON object")
    return build(schema, value)


def wrong_fields(error: BaseException) -> dict[str, str]:
    """The members that a schema refused, each with the reason."""
    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return {}
    found = {named(one["loc"]): str(one["msg"])[:200] for one in cause.errors(include_url=False, include_input=False)}
    return dict(list(found.items())[:20])


def answer(
    value: BaseModel | Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON answer."""
    text = value.model_dump_json() if isinstance(value, BaseModel) else json.dumps(value, separators=(",", ":"))
    fixed = {"Cache-Control": "no-store", **(headers or {})}
    return Response(text, status, fixed, "application/json")


def no_content() -> Response:
    return Response(status_code=204)
