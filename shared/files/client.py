"""Requests to a bucket or a web server: how often each is tried, and what its failures mean.

Reads and small requests are tried TRIES times here. obstore retries the parts of an upload as often, so they are not
retried here. obstore distinguishes few kinds of failure, so its messages are searched; tests/store/test_remote.py
checks those messages.
"""

import asyncio
import itertools
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import SplitResult

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import HTTPStore

from shared.errors import BusyError, UserError
from shared.files import connect
from shared.files.base import too_large
from shared.files.connect import (
    BACKOFF_SECONDS,
    LISTING_SECONDS,
    SLOWEST_RATE,
    TOTAL_SECONDS,
    TRIES,
    Connection,
    open_connection,
)
from shared.files.handles import Buffer

PART_BYTES: Final = 8 << 20
"""Largest part of an object that one request carries, in either direction."""
PARTS_AT_ONCE: Final = 8
MAX_ENTRIES: Final = 10_000_000
"""Largest number of entries in a listing: a store of 10^5 shards has a third of it."""

Result = TypeVar("Result")


class ServerError(UserError):
    """A server does not do what was requested."""


class UnreachableError(BusyError, ServerError):
    """A server cannot be reached, is busy or broken, or broke off: the same request can succeed later."""


class IncompleteError(Exception):
    """A server sent other bytes than were requested. Another try may help."""


class ServerFailure(NamedTuple):
    sign: str
    """A regular expression for obstore's message."""
    final: bool
    """Whether another try is useless."""
    temporary: bool
    """Whether the same command can succeed later, when all tries have failed."""
    words: str
    advice: str


LATER: Final = "Try again, or check the server and the network"
FAILURES: Final = (
    ServerFailure(
        r"169\.254\.169\.254|metadata\.google|Missing\w*Key|Received None from session",
        False,
        False,
        "no credentials were found",
        "For s3:// set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (profiles need boto3: pip install "
        "boto3), or AWS_SKIP_SIGNATURE=true for a public bucket; for gs:// set GOOGLE_APPLICATION_CREDENTIALS, or "
        "GOOGLE_SKIP_SIGNATURE=true",
    ),
    ServerFailure("NoSuchBucket", True, False, "there is no such bucket", "Create it, or correct its name"),
    ServerFailure(
        "BareRedirect|PermanentRedirect|AuthorizationHeaderMalformed",
        True,
        False,
        "the bucket is in another region",
        "Set AWS_REGION to the bucket's region",
    ),
    ServerFailure(
        "NotPartial|RangeNotSupported|NotImplemented",
        True,
        False,
        "the server does not support this kind of request",
        "Reading needs byte ranges (HTTP Range), writing needs If-None-Match: use a server that has them, or a disk",
    ),
    ServerFailure(
        r"status: 40[13]",
        True,
        False,
        "access was refused",
        "Check the credentials (AWS_* or GOOGLE_* variables, AWS_PROFILE; HF_TOKEN for hf://), and that they allow "
        "this. Some servers also answer this for a missing object",
    ),
    ServerFailure(r"status: (408|429|5\d\d)", False, True, "the server is busy or broken", LATER),
    ServerFailure(r"status: \d", True, False, "the server refused the request", "Check the address"),
    ServerFailure(
        "InvalidCertificate",
        True,
        False,
        "the server's certificate is not trusted",
        "SSL_CERT_FILE names a file of the authorities to trust",
    ),
    ServerFailure(
        r"legacy::Error\(\s*Connect",
        False,
        True,
        "the server cannot be reached",
        "Check the address (AWS_ENDPOINT_URL, if set) and the network",
    ),
    ServerFailure("TimedOut|kind: Timeout", False, True, "the server took too long to answer", LATER),
    ServerFailure("kind: (Interrupted|Request)", False, True, "the connection broke off", LATER),
    ServerFailure("", False, True, "", LATER),
)
DETAILS: Final = r"status code: (\d+ [\w ]+)", r"<Code>(\w+)</Code>", r'message: "([^"]+)"', r'error: "([^"]+)"'


def failure_of(error: Exception) -> tuple[ServerFailure, str]:
    """Returns the kind of a failure, and a short text of what happened."""
    text = str(error)
    failure = next(one for one in FAILURES if re.search(one.sign, text))
    details = [found[1] for pattern in DETAILS if (found := re.search(pattern, text))]
    plain = ", ".join(details) or ("" if failure.words else text.partition("\n")[0].rstrip("."))
    return failure, f"{failure.words} ({plain})" if failure.words and plain else failure.words or plain


class ObjectClient:
    """One bucket or web server. `name` is what messages call the object. Methods raise FileNotFoundError when it does
    not exist."""

    def __init__(self, where: str, connection: Connection) -> None:
        self.where = where
        self.reads, self.asks, self.uploads = connection
        self.read_only = isinstance(self.reads, HTTPStore)

    @classmethod
    def connect(cls, parts: SplitResult) -> "ObjectClient":
        """Makes a client; sends nothing."""
        try:
            return cls(*open_connection(parts))
        except (BaseError, ValueError) as error:
            failure, words = failure_of(error)
            raise ServerError(f"{parts.geturl()}: {words}. {failure.advice}") from error

    def get(self, key: str, name: str, most: int) -> tuple[bytes, Any]:
        """Returns a whole object and its metadata. Raises DamagedError, before any byte is read, when the server
        announces more than `most` bytes."""

        def request() -> tuple[bytes, Any]:
            answer = obstore.get(self.reads, key)
            size = answer.meta["size"]
            if size > most:
                raise too_large(name, size, most)
            data = bytes(read_body(answer, size))
            if len(data) != size:
                raise IncompleteError(f"{len(data)} bytes came, {size} were announced")
            return data, answer.meta

        return with_retries(name, "read", request)

    def get_range(self, key: str, name: str, offset: int, length: int, check: Callable[[int], None]) -> Buffer:
        """Returns these bytes. `check` is called with the object's size."""

        def request() -> Buffer:
            try:
                answer = obstore.get(self.reads, key, options={"range": (offset, offset + length)})
            except BaseError as error:
                if "UnexpectedRange" in str(error) or "status: 416" in str(error):  # the object may be too short
                    check(obstore.head(self.asks, key)["size"])
                raise
            check(answer.meta["size"])
            data = read_body(answer, length)
            if len(data) != length:
                raise IncompleteError(f"{len(data)} bytes came, {length} were asked for")
            return data

        return with_retries(name, "read", request)

    def put(self, key: str, name: str, data: bytes, mode: Any = "overwrite") -> None:
        """Writes one small object: always, or only if there is none (`create`), or only over one with these tags.
        Raises AlreadyExistsError, PreconditionError."""
        with_retries(name, "written", lambda: obstore.put(self.asks, key, data, mode=mode, use_multipart=False))

    def upload(self, key: str, name: str, pieces: Iterable[Buffer]) -> None:
        """Writes one object of any size, all of it or nothing."""
        parts = parts_of(pieces)
        first, second = next(parts, bytearray()), next(parts, None)

        def request() -> None:
            if second is None:
                obstore.put(self.uploads, key, first, use_multipart=False)
            else:
                every = itertools.chain([first, second], parts)
                obstore.put(self.uploads, key, every, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

        with_retries(name, "written", request, tries=1)

    def delete(self, keys: list[str], name: str) -> None:
        for begin in range(0, len(keys), 1000):
            with_retries(name, "deleted", partial(obstore.delete, self.asks, keys[begin : begin + 1000]))

    def listing(self, key: str, name: str) -> Any:
        """`objects` and `common_prefixes` directly below a key."""
        end = time.monotonic() + LISTING_SECONDS

        async def request() -> Any:
            asked = obstore.list_with_delimiter_async(self.asks, key)
            return await asyncio.wait_for(asked, max(0.01, end - time.monotonic()))

        return with_retries(name, "listed", lambda: run_coroutine(request, name))

    def list_all(self, key: str, name: str) -> list[Any]:
        """All objects below a key, however deep."""

        def request() -> list[Any]:
            found: list[Any] = []
            for some in obstore.list(self.asks, key):
                found += some
                if len(found) > MAX_ENTRIES:
                    raise ServerError(f"{name}: the server lists more than {MAX_ENTRIES:,} objects. Check the server")
            return found

        return with_retries(name, "listed", request)


def read_body(answer: Any, most: int) -> Buffer:
    """The body of an answer, read as it arrives. Raises IncompleteError when it has more than `most` bytes, or arrives
    slower than SLOWEST_RATE."""
    parts, size = [], 0
    since, before = time.monotonic(), 0
    for part in answer.stream(min_chunk_size=1):
        parts.append(part)
        size += len(part)
        if size > most:
            raise IncompleteError(f"more than {most} bytes came")
        seconds = time.monotonic() - since
        if seconds > connect.STALL_SECONDS:
            if size - before < SLOWEST_RATE * seconds:
                raise IncompleteError(f"only {size - before} bytes came in {seconds:.0f} s")
            since, before = time.monotonic(), size
    return memoryview(parts[0]) if len(parts) == 1 else b"".join(parts)


def run_coroutine(request: Callable[[], Any], name: str) -> Any:
    """Returns the result of a coroutine, also where an event loop runs already (a notebook). Raises
    UnreachableError when it takes too long."""
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(lambda: asyncio.run(request())).result()
        except TimeoutError as error:
            raise UnreachableError(
                f"{name}: could not be listed: the server did not finish within {LISTING_SECONDS:.0f} s. {LATER}"
            ) from error


def parts_of(pieces: Iterable[Buffer]) -> Iterator[bytearray]:
    """The same bytes in parts of PART_BYTES. It copies: an upload may still read one part while the next is made."""
    part = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        while len(view):
            room = PART_BYTES - len(part)
            part += view[:room]
            view = view[room:]
            if len(part) == PART_BYTES:
                yield part
                part = bytearray()
    if part:
        yield part


def with_retries(name: str, doing: str, request: Callable[[], Result], tries: int = TRIES) -> Result:
    """Returns the result of a request, tried up to `tries` times. Raises FileNotFoundError for a missing object,
    UnreachableError for a temporary failure, ServerError for everything else."""
    started, pause = time.monotonic(), BACKOFF_SECONDS
    for attempt in itertools.count(1):
        try:
            return request()
        except (AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, FileNotFoundError, IncompleteError) as error:
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
                raise FileNotFoundError(f"{name}: is not there") from error
            late = time.monotonic() - started > TOTAL_SECONDS
            failure = failure_of(error)[0]
            if attempt == tries or late or failure.final:
                kind = UnreachableError if failure.temporary else ServerError
                raise kind(failure_message(name, doing, error, attempt)) from error
        time.sleep(pause * random.SystemRandom().uniform(0.5, 1.5))
        pause *= 2
    raise AssertionError("counting ended")


def failure_message(name: str, doing: str, error: Exception, tries: int) -> str:
    failure, words = failure_of(error)
    if found := re.search(r"\bretries: (\d+)", str(error)):
        tries += int(found[1])  # obstore's own tries of an upload
    after = f" after {tries} tries (last: {words})" if tries > 1 else f": {words}"
    return f"{name}: could not be {doing}{after}. {failure.advice}"
