"""Files in an object store (s3://, gs://) or behind a web server (http://, https://, read-only).

An object is whole or absent: it is written by one PUT, or by an upload in parts that ends with one request. Appending
is impossible, so a line of a log is an object of its own. Committed files are read by byte ranges, from many threads at
once; exactly the requested bytes are accepted. Ranges of a file whose checksum the caller knows are cached on disk.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Final
from urllib.parse import unquote

from shared.errors import DamagedError, UserError
from shared.files.base import AGAIN, Files, LogMark, Write, most_bytes, safe
from shared.files.cache import Key, RangeCache
from shared.files.client import PART_BYTES, ObjectClient, ServerError
from shared.files.connect import parse_url
from shared.files.handles import VERIFY, Buffer
from shared.files.locks import lock_file
from shared.files.object_lock import object_lock
from shared.store.shard import crc32c

JOINED: Final = 64
"""Lines in a log that is joined from logs of one line each. An unfinished store has at most this many logs of one line
per writer, and one object for every JOINED older lines."""
AT_ONCE: Final = 16
SINGLE: Final = re.compile(r"(.+)\.(\d{8,})\.jsonl")
"""The name of a log of one line: the name of the log that it belongs to, and the number of the line."""


class RemoteFile:
    """An object that does not change, read by ranges. Opening it costs no request."""

    def __init__(
        self, client: ObjectClient, key: str, name: str, size: int, crc: int | None, cache: RangeCache
    ) -> None:
        self.client, self.key, self.name, self.size, self.crc = client, key, name, size, crc
        self.cache = cache if crc is not None else RangeCache(cache.folder, 0)

    def read(self, offset: int, length: int) -> Buffer:
        if length <= PART_BYTES:
            return self.read_part(offset, length)
        data = bytearray()  # one request per part: each is short, and a failure loses one part only
        for begin in range(0, length, PART_BYTES):
            data += self.read_part(offset + begin, min(PART_BYTES, length - begin))
        return memoryview(data)

    def read_part(self, offset: int, length: int) -> Buffer:
        if not length:
            return b""
        found = self.cache.get(self.cache_key(offset, length), length)
        if found is not None:
            return found
        try:
            data = self.client.get_range(self.key, self.name, offset, length, self.check)
        except FileNotFoundError as error:
            raise DamagedError(f"{self.name}: is committed but missing. {VERIFY}") from error
        self.cache.put(self.cache_key(offset, length), data)
        return data

    def forget(self, offset: int, length: int) -> bool:
        """Always returns True: even without a cached copy, the next request may return other bytes."""
        for begin in range(0, length, PART_BYTES):
            self.cache.forget(self.cache_key(offset + begin, min(PART_BYTES, length - begin)))
        return True

    def cache_key(self, offset: int, length: int) -> Key:
        return self.client.where, self.key, self.size, self.crc or 0, offset, length

    def check(self, found: int) -> None:
        if found != self.size:
            raise DamagedError(f"{self.name}: has {found} bytes, {self.size} were committed. {VERIFY}")


class RemoteFiles:
    """The objects below a prefix."""

    def __init__(self, client: ObjectClient, prefix: str, name: str, cache: RangeCache) -> None:
        self.client, self.prefix, self.name, self.cache = client, prefix, name, cache
        self.single: dict[str, dict[str, bytes]] = {}
        """Lines that were appended here and are still objects of their own: by log, then by path."""

    @classmethod
    def connect(cls, url: str) -> "RemoteFiles":
        """The files at a URL; sends nothing. Raises UserError when the URL cannot be one."""
        parts = parse_url(url)
        path = unquote(parts.path) if parts.scheme.startswith("http") else parts.path
        return cls(ObjectClient.connect(parts), path.strip("/"), url.rstrip("/"), RangeCache.of_user())

    def place(self, path: str) -> tuple[str, str]:
        """An object's key, and its name for messages."""
        return f"{self.prefix}/{safe(path)}".strip("/"), f"{self.name}/{path}".rstrip("/")

    def read(self, path: str) -> bytes:
        return self.client.get(*self.place(path), most_bytes(path))[0]

    def open(self, path: str, size: int, crc: int | None = None) -> RemoteFile:
        """Opens an object. With the committed checksum, which identifies this content, its ranges are cached."""
        return RemoteFile(self.client, *self.place(path), size, crc, self.cache)

    def write(self, path: str, pieces: Iterable[Buffer]) -> None:
        self.check_writable()
        self.client.upload(*self.place(path), pieces)

    @contextmanager
    def together(self) -> Iterator[Write]:
        yield self.write  # an object is durable once it exists

    def append(self, path: str, line: bytes, number: int) -> None:
        self.check_writable()
        stem, _, suffix = path.rpartition(".")
        single = f"{stem}.{number:08d}.{suffix}"
        self.client.put(*self.place(single), line)
        waiting = self.single.setdefault(stem, {})
        waiting[single] = line
        if len(waiting) >= JOINED:
            self.join(stem, self.single.pop(stem))

    def join(self, stem: str, lines: dict[str, bytes]) -> None:
        """Joins lines (by path) into one object, then deletes their own objects. The name of the new object contains
        the checksum of its content, so other lines can never overwrite it. A line that is in both, after a crash in
        between, is the same line."""
        data = b"".join(lines[path] for path in sorted(lines))
        first = SINGLE.fullmatch(min(lines))
        assert first is not None
        self.client.put(*self.place(f"{stem}.part.{first[2]}-{crc32c(data):08x}.jsonl"), data)
        self.remove_all(sorted(lines))

    def join_logs(self, folder: str, prefix: str) -> None:
        singles: dict[str, list[str]] = {}
        for path in self.logs(folder, prefix):
            if found := SINGLE.fullmatch(path):
                singles.setdefault(found[1], []).append(path)
        with (
            ThreadPoolExecutor(AT_ONCE) as pool,
            suppress(FileNotFoundError),
        ):  # its writer may have joined it meanwhile
            for stem, paths in singles.items():
                for begin in range(0, len(paths) - JOINED + 1, JOINED):
                    some = paths[begin : begin + JOINED]
                    self.join(stem, dict(zip(some, pool.map(self.read, some), strict=True)))

    def logs(self, folder: str, prefix: str) -> list[str]:
        return list(self.marks(folder, prefix))

    def marks(self, folder: str, prefix: str) -> dict[str, LogMark]:
        if self.client.read_only:
            raise UserError(
                f"{self.name}: an unfinished store cannot be read over http. Finish it, or read it in place"
            )
        found = {last_name(meta["path"]): meta for meta in self.client.listing(*self.place(folder))["objects"]}
        return {
            f"{folder}/{name}": LogMark(
                f"{found[name]['e_tag']} {found[name]['last_modified']}", found[name]["size"], False
            )
            for name in sorted(found)
            if name.startswith(prefix) and name.endswith(".jsonl") and is_name(name)
        }

    def read_from(self, path: str, offset: int) -> bytes:
        return self.read(path)[offset:]

    def remove(self, path: str) -> None:
        self.check_writable()
        key, name = self.place(path)
        with suppress(FileNotFoundError):
            self.client.delete([key], name)

    def remove_all(self, paths: list[str]) -> None:
        self.check_writable()
        for lines in self.single.values():
            for path in lines.keys() & set(paths):
                del lines[path]
        with suppress(FileNotFoundError):
            self.client.delete([self.place(path)[0] for path in paths], self.name)

    def folders(self) -> list[str]:
        if self.client.read_only:
            raise UserError(f"{self.name}: folders cannot be listed over http. Name the store itself")
        names = {last_name(path) for path in self.client.listing(*self.place(""))["common_prefixes"]}
        return sorted(name for name in names if is_name(name))

    def clear(self, unwanted: Callable[[str], bool]) -> None:
        """Deletes files first: a folder without its zarr.json is no store, whatever else is left."""
        self.check_writable()
        here = self.client.listing(*self.place(""))
        keys = [meta["path"] for meta in here["objects"] if unwanted(last_name(meta["path"]))]
        self.client.delete(keys, self.name)
        for folder in here["common_prefixes"]:
            if unwanted(last_name(folder)):
                self.client.delete([meta["path"] for meta in self.client.list_all(folder, self.name)], self.name)

    def check_removable(self, unwanted: Callable[[str], bool]) -> None:  # noqa: ARG002 (a bucket reports it at the request)
        self.check_writable()

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()  # an object store does not know its readers

    def unread(self) -> AbstractContextManager[None]:
        return nullcontext()

    def at(self, path: str) -> Files:
        return RemoteFiles(self.client, *self.place(path), self.cache)

    def lock(self, writer: int = 0) -> AbstractContextManager[None]:
        self.check_writable()
        return object_lock(self.client, *self.place(lock_file(writer)))

    def at_work(self) -> bool | None:
        return None  # an object store does not know its writers' processes

    @contextmanager
    def explained(self, after: str = AGAIN) -> Iterator[None]:
        try:
            yield
        except ServerError as error:
            raise type(error)(f"{error}; {after}") from error

    def check_writable(self) -> None:
        if self.client.read_only:
            raise UserError(f"{self.name}: can only be read. Write to a folder, s3:// or gs://")


def is_name(text: str) -> bool:
    """Whether a listed name is acceptable: it will be requested again, and printed."""
    return text not in ("", ".", "..") and len(text) <= 255 and text.isprintable()


def last_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
