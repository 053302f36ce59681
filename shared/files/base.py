"""The verbs that every folder of files has, local or remote, and how locations and paths are written.

Files are whole or absent, whatever is killed when. What was committed is read by position, with the length that was
committed; a file of another length is damage. Paths are relative to the folder, with `/`.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, NamedTuple, Protocol, runtime_checkable

from shared.errors import DamagedError
from shared.files.handles import VERIFY, Buffer

AGAIN: Final = "then run the same command again: what is committed is safe and stays"
DOCUMENT_BYTES: Final = 64 << 20
"""The most that is read of a file that describes something: zarr.json, a record."""
WHOLE_BYTES: Final = 1 << 30
"""The most that is read of any other file as a whole: a manifest of a million shards."""
Write = Callable[[str, Iterable[Buffer]], None]
"""Writes a file of all the pieces."""


class LogMark(NamedTuple):
    """What a log was when it was looked at: equal marks mean equal content."""

    identity: str
    size: int
    grows: bool
    """Whether a log of the same identity that is larger has this one's bytes at its beginning."""

    def continues(self, before: "LogMark") -> bool:
        return self.grows and self.identity == before.identity and self.size >= before.size


@runtime_checkable
class OpenFile(Protocol):
    """A file that does not change, read by position from any thread."""

    def read(self, offset: int, length: int) -> Buffer:
        """Exactly these bytes, valid until the same thread reads again. Raises DamagedError when there are fewer."""
        ...

    def forget(self, offset: int, length: int) -> bool:
        """Drops a copy of these bytes that turned out wrong; whether there was one, so that reading again may help."""
        ...


@runtime_checkable
class Files(Protocol):
    """A folder of files."""

    name: str
    """What the user calls it: for messages."""

    def read(self, path: str) -> bytes:
        """A whole file. Raises FileNotFoundError when there is none."""
        ...

    def open(self, path: str, size: int, crc: int | None = None) -> OpenFile:
        """A committed file of `size` bytes. Raises DamagedError when it is missing or of another length. With the
        crc32 that was committed, a copy of what was read before may be used where reading is slow."""
        ...

    def write(self, path: str, pieces: Iterable[Buffer]) -> None:
        """A file of all the pieces, durable when this returns; or, after any failure, what was there before."""
        ...

    def together(self) -> AbstractContextManager[Write]:
        """Gives what writes files that belong together, from any thread: durable when the block is left, which costs a
        disk far less than one by one. After a failure in the block none of them is there."""
        ...

    def append(self, path: str, line: bytes, number: int) -> None:
        """Adds a line to a log, durable when this returns. Where nothing can be appended to, line `number` becomes a
        file of its own beside it: see `logs`."""
        ...

    def logs(self, folder: str, prefix: str) -> list[str]:
        """Paths of the logs in a folder whose name begins with `prefix`, sorted."""
        ...

    def marks(self, folder: str, prefix: str) -> dict[str, LogMark]:
        """The same, each with a mark of what it is now."""
        ...

    def read_from(self, path: str, offset: int) -> bytes:
        """A file from there to its end. Raises FileNotFoundError when there is none."""
        ...

    def join_logs(self, folder: str, prefix: str) -> None:
        """Where a line is a file of its own: makes one log of many. No line is ever in none of them."""
        ...

    def remove(self, path: str) -> None:
        """Deletes a file; none is fine."""
        ...

    def remove_all(self, paths: list[str]) -> None:
        """Deletes many files."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted."""
        ...

    def clear(self, unwanted: Callable[[str], bool]) -> None:
        """Deletes the files and folders here whose name is unwanted, with all that is in them."""
        ...

    def check_removable(self, unwanted: Callable[[str], bool]) -> None:
        """Before `clear`: raises UserError where it could not do all of it."""
        ...

    def at(self, path: str) -> "Files":
        """A folder in this one."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """While a store is read for long: who wants to delete it is told so. Writes nothing."""
        ...

    def unread(self) -> AbstractContextManager[None]:
        """While a store is deleted or taken back. Raises UserError when somebody is reading it, as far as this can be
        seen."""
        ...

    def lock(self, writer: int = 0) -> AbstractContextManager[None]:
        """One writer at a time, or one of each number. Raises UserError naming the holder."""
        ...

    def explained(self, after: str = ...) -> AbstractContextManager[None]:
        """Turns what a disk or a server can do to a writer into a UserError; what is committed stays valid. `after` is
        what to do when the cause is mended."""
        ...


def is_remote(location: str | Path) -> bool:
    return "://" in str(location)


def parent_of(location: str) -> str | None:
    """The folder that a location is in; None at the top."""
    head, slash, tail = location.rstrip("/").rpartition("/")
    if is_remote(location):
        return head if slash and tail and not head.endswith("/") and head.count("/") >= 2 else None
    parent = os.path.dirname(location.rstrip("/")) or "."
    return None if parent == location else parent


def join(location: str, name: str) -> str:
    return f"{location.rstrip('/')}/{name}" if is_remote(location) else str(Path(location) / name)


def most_bytes(path: str) -> int:
    """How large a file may be that is read as a whole."""
    return DOCUMENT_BYTES if path.endswith((".json", ".toml")) else WHOLE_BYTES


def too_large(what: str, size: int, most: int) -> DamagedError:
    return DamagedError(f"{what}: has {size:,} bytes; a file of its kind has at most {most:,}. {VERIFY}")


def safe(path: str) -> str:
    """A path inside a folder, as it is. Raises DamagedError for one that leads out of it."""
    if path[:1] == "/" or path[-1:] == "/" or "//" in path or "\0" in path or ".." in path.split("/"):
        raise DamagedError(f"{path!r}: leads out of the store: it was not written by sagsae. Do not use it")
    return path
