"""Files in an object store (s3://, gs://) or behind a web server (http://, https://, which can only be read).

An object is whole or absent: one PUT, or an upload in parts that ends with one. There is no appending: a line of a log
is an object of its own. What was committed is read by byte ranges, from many threads at once, never more or fewer bytes
than asked for. Ranges of a file whose checksum the caller knows are kept in a cache on disk.
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
from shared.files.client import PART_BYTES, Client, ServerError
from shared.files.connect import parse
from shared.files.handles import VERIFY, Buffer
from shared.files.locks import lock_file
from shared.files.object_lock import object_lock
from shared.store.shard import crc32c

JOINED: Final = 64
"""Lines in a log that is made of logs of one line each: a store that is being written has at most so many of those
for each writer, and one object for so many others."""
AT_ONCE: Final = 16
SINGLE: Final = re.compile(r"(.+)\.(\d{8,})\.jsonl")
"""The name of a log of one line: that of the log that it belongs to, and the line's number."""


class RemoteFile:
    """An object that does not change, read by ranges. Costs no request before the first."""

    def __init__(self, client: Client, key: str, name: str, size: int, crc: int | None, cache: RangeCache) -> None:
        self.client, self.key, self.name, self.size, self.crc = client, key, name, size, crc
        self.cache = cache if crc is not None else RangeCache(cache.folder, 0)

    def read(self, offset: int, length: int) -> Buffer:
        if length <= PART_BYTES:
            return self.read_part(offset, length)
        data = bytearray()  # a part a request: each is short, and lost alone
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
        """Always true: without a cached copy, too, other bytes may come the next time."""
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

    def __init__(self, client: Client, prefix: str, name: str, cache: RangeCache) -> None:
        self.client, self.prefix, self.name, self.cache = client, prefix, name, cache
        self.single: dict[str, dict[str, bytes]] = {}
        """The lines that were appended here and are still objects of their own: by log, then by path."""

    @classmethod
    def connect(cls, url: str) -> "RemoteFiles":
        """The files at a URL; sends nothing. Raises UserError when it cannot be one."""
        parts = parse(url)
        path = unquote(parts.path) if parts.scheme.startswith("http") else parts.path
        return cls(Client.connect(parts), path.strip("/"), url.rstrip("/"), RangeCache.of_user())

    def place(self, path: str) -> tuple[str, str]:
        """An object's key, and its name for messages."""
        return f"{self.prefix}/{safe(path)}".strip("/"), f"{self.name}/{path}".rstrip("/")

    def read(self, path: str) -> bytes:
        return self.client.get(*self.place(path), most_bytes(path))[0]

    def open(self, path: str, size: int, crc: int | None = None) -> RemoteFile:
        """With the committed checksum, which tells this content from any other, its ranges are cached."""
        return RemoteFile(self.client, *self.place(path), size, crc, self.cache)

    def write(self, path: str, pieces: Iterable[Buffer]) -> None:
        self.check_writable()
        self.client.upload(*self.place(path), pieces)

    @contextmanager
    def together(self) -> Iterator[Write]:
        yield self.write  # an object is durable when it is there

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
        """Lines by path to one object, then away with those that they were in. Its name says what it holds: no other
        lines can ever be written over it. A line that is in both, after a crash between the two, is the same line."""
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
        with ThreadPoolExecutor(AT_ONCE) as pool, suppress(FileNotFoundError):  # joined by its writer meanwhile
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
            raise UserError(f"{self.name}: what is there cannot be listed over http. Name the store itself")
        names = {last_name(path) for path in self.client.listing(*self.place(""))["common_prefixes"]}
        return sorted(name for name in names if is_name(name))

    def clear(self, unwanted: Callable[[str], bool]) -> None:
        """Files first: a store without its zarr.json is none, whatever else is left of it."""
        self.check_writable()
        here = self.client.listing(*self.place(""))
        keys = [meta["path"] for meta in here["objects"] if unwanted(last_name(meta["path"]))]
        self.client.delete(keys, self.name)
        for folder in here["common_prefixes"]:
            if unwanted(last_name(folder)):
                self.client.delete([meta["path"] for meta in self.client.everything(folder, self.name)], self.name)

    def check_removable(self, unwanted: Callable[[str], bool]) -> None:  # noqa: ARG002 (a bucket says so when asked)
        self.check_writable()

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()  # an object store knows nothing of readers

    def unread(self) -> AbstractContextManager[None]:
        return nullcontext()

    def at(self, path: str) -> Files:
        return RemoteFiles(self.client, *self.place(path), self.cache)

    def lock(self, writer: int = 0) -> AbstractContextManager[None]:
        self.check_writable()
        return object_lock(self.client, *self.place(lock_file(writer)))

    @contextmanager
    def explained(self, after: str = AGAIN) -> Iterator[None]:
        try:
            yield
        except ServerError as error:
            raise UserError(f"{error}; {after}") from error

    def check_writable(self) -> None:
        if self.client.read_only:
            raise UserError(f"{self.name}: can only be read. Write to a folder, s3:// or gs://")


def is_name(text: str) -> bool:
    """Whether a name that a server lists can be one: it is asked for again, and printed."""
    return text not in ("", ".", "..") and len(text) <= 255 and text.isprintable()


def last_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
