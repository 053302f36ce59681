"""The bytes of stores: GET and HEAD of committed files, by ranges.

A range is one `pread` and one message, which costs a fifth of what a file response in blocks does. A committed file
never changes, so its ETag is the committed crc32 and a client may keep it for ever.
"""

import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from anyio import to_thread
from starlette.responses import Response, StreamingResponse

from harvest.serve.rest.endpoint import Endpoint, HttpError, Level, RestCall, Service
from harvest.serve.rest.open_stores import StoreFile, opened
from shared.errors import DamagedError
from shared.files.handles import VERIFY
from shared.refusals import UnknownError

RANGE_BYTES: Final = 8 << 20
"""Largest range."""
PIECE_BYTES: Final = 1 << 20
"""Bytes of a longer file that are in memory at once."""
RANGE: Final = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*")
FOR_EVER: Final = "private, max-age=31536000, immutable"
ACCEL: Final = "/.sagsae-files/"
"""The internal location of nginx below which the root is."""
TOUCH_S: Final = 60.0
"""Seconds between two notes that a store is read."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file: from `first` up to but not including `stop`."""

    first: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class FileRequest:
    """The headers that decide what is sent of a file."""

    head: bool
    ranges: str | None
    none_match: str | None
    if_range: str | None


class FileRoutes:
    """Serves files, and notes now and then that their stores are in use."""

    def __init__(self) -> None:
        self.touched: dict[str, float] = {}

    async def serve(self, call: RestCall) -> Response:
        """GET /v1/stores/{store}/files/{path}"""
        service, headers = call.service, call.request.headers
        store, path = call.path("store"), call.path("path")
        asked = FileRequest(
            call.request.method == "HEAD", headers.get("range"), headers.get("if-none-match"), headers.get("if-range")
        )
        response = await to_thread.run_sync(file_answer, service, store, path, asked)
        if response.status_code < 300:
            await self.touch(service, store)
            service.counters.bytes_sent += 0 if asked.head else int(response.headers.get("content-length", 0))
        return response

    async def touch(self, service: Service, store: str) -> None:
        now = time.monotonic()
        if now - self.touched.get(store, -TOUCH_S) >= TOUCH_S:
            self.touched[store] = now
            await to_thread.run_sync(service.state.touch, store)

    def endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint(
                "GET",
                "/v1/stores/{store}/files/{path:path}",
                self.serve,
                Level.READ,
                "Read a file of a store, whole or one range of at most 8 MiB. HEAD works, too.",
                answers={200: "application/octet-stream", 206: "application/octet-stream", 304: None},
                errors=(401, 404, 416),
            ),
        )


def file_answer(service: Service, store: str, path: str, asked: FileRequest) -> Response:
    """The answer for a file. Raises UnknownError, DamagedError, HttpError (416)."""
    found = service.stores.open(store).find(path)
    if found is None:
        raise no_file(store, path)
    try:
        with opened(service.root / store, path) as (handle, status):
            check_size(store, found, status.st_size)
            tag = tag_of(found, status)
            headers = {
                "Accept-Ranges": "bytes",
                "ETag": tag,
                "Cache-Control": "no-cache" if found.crc is None else FOR_EVER,
            }
            if matches(asked.none_match, tag):
                return Response(status_code=304, headers=headers)
            whole = asked.if_range is not None and asked.if_range != tag
            span = None if whole else span_of(asked.ranges, status.st_size)
            if service.config.accel == "nginx":
                place = ACCEL + quote(f"{store}/{path}")
                return Response(None, 200, {**headers, "X-Accel-Redirect": place}, media_type(path))
            return sent(handle, path, span, status.st_size, asked.head, headers)
    except FileNotFoundError as error:
        if found.crc is None:
            raise no_file(store, path) from error
        raise DamagedError(f"{store}/{path}: is committed but missing, or is a link. {VERIFY}") from error


def no_file(store: str, path: str) -> UnknownError:
    return UnknownError(f"{store}: has no file {path[:200]!r}. Its spec and its manifest name those that it has")


def check_size(store: str, found: StoreFile, size: int) -> None:
    if found.size is not None and size != found.size:
        raise DamagedError(f"{store}/{found.path}: has {size} bytes, {found.size} were committed. {VERIFY}")


def tag_of(found: StoreFile, status: os.stat_result) -> str:
    if found.crc is not None:
        return f'"{found.crc:08x}"'
    marks = f"{status.st_ino} {status.st_mtime_ns} {status.st_size}"
    return f'"{hashlib.blake2b(marks.encode(), digest_size=8).hexdigest()}"'


def matches(header: str | None, tag: str) -> bool:
    """Whether an If-None-Match names the tag."""
    if header is None:
        return False
    names = [name.strip().removeprefix("W/") for name in header.split(",")]
    return "*" in names or tag in names


def span_of(header: str | None, size: int) -> Span | None:
    """The bytes that a Range header asks for; None for the whole file. Raises HttpError (416) where the file has
    none of them, for several ranges, and for one of more than 8 MiB."""
    if header is None or not header.strip().lower().startswith("bytes"):
        return None
    found = RANGE.fullmatch(header.strip())
    if found is None or found[1] == found[2] == "":
        raise no_range(size, f"Range {header[:60]!r}: expected one range, such as bytes=0-1023")
    if found[1] == "":
        span = Span(max(0, size - int(found[2])), size)
    else:
        span = Span(int(found[1]), min(int(found[2]) + 1, size) if found[2] else size)
        if found[2] and int(found[2]) < int(found[1]):
            raise no_range(size, f"Range {header[:60]!r}: ends before it begins")
    if span.length <= 0:
        raise no_range(size, f"Range {header[:60]!r}: lies behind the end; the file has {size:,} bytes")
    if span.length > RANGE_BYTES and found[1] and found[2]:
        raise no_range(size, f"Range {header[:60]!r}: has more than {RANGE_BYTES:,} bytes. Ask for several, one by one")
    return span


def no_range(size: int, message: str) -> HttpError:
    return HttpError(416, "range", message, {"Content-Range": f"bytes */{size}"})


def sent(handle: int, path: str, span: Span | None, size: int, head: bool, headers: Mapping[str, str]) -> Response:
    """The bytes as an answer: one read of at most 8 MiB, or else a stream in pieces."""
    part = span or Span(0, size)
    status = 200 if span is None else 206
    fixed = {**headers, "Content-Length": str(part.length)}
    if span is not None:
        fixed["Content-Range"] = f"bytes {part.first}-{part.stop - 1}/{size}"
    if head:
        return Response(None, status, fixed, media_type(path))
    if part.length <= RANGE_BYTES:
        data = read_exactly(handle, part.first, part.length, path)
        return Response(data, status, fixed, media_type(path))
    return StreamingResponse(pieces(os.dup(handle), part, path), status, fixed, media_type(path))


def read_exactly(handle: int, first: int, length: int, path: str) -> bytes:
    data = os.pread(handle, length, first)
    while len(data) < length:
        more = os.pread(handle, length - len(data), first + len(data))
        if not more:
            raise DamagedError(f"{path}: ends after {first + len(data)} bytes. {VERIFY}")
        data += more
    return data


async def pieces(handle: int, part: Span, path: str) -> AsyncIterator[bytes]:
    """A long part of a file, piece by piece. It closes the handle."""
    try:
        for at in range(part.first, part.stop, PIECE_BYTES):
            yield await to_thread.run_sync(read_exactly, handle, at, min(PIECE_BYTES, part.stop - at), path)
    finally:
        os.close(handle)


def media_type(path: str) -> str:
    return "application/json" if path.endswith(".json") else "application/octet-stream"
