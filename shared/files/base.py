"""The operations that every folder of files has, local or remote, and how locations and paths are written.

A file is whole or absent, whenever a process is killed. Committed files are read by position and have the length that
was committed; a file of another length is damaged. Paths are relative to the folder, with `/`.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, NamedTuple, Protocol, runtime_checkable

from shared.errors import DamagedError
from shared.files.handles import VERIFY, Buffer
from shared.hub.place import is_hub, parent_on_hub

AGAIN: Final = "then run the same command again; committed data is safe"
DOCUMENT_BYTES: Final = 64 << 20
"""Largest file that describes something (zarr.json, a record), in bytes."""
SERVED: Final = "/v1/stores/"
"""What stands between the address of an activation cache and the id of a store that it serves."""
WHOLE_BYTES: Final = 1 << 30
"""Largest other file that is read whole, in bytes: a manifest of a million shards."""
Write = Callable[[str, Iterable[Buffer]], None]
"""Writes a file made of all the pieces."""


class LogMark(NamedTuple):
    """The state of a log when it was listed: equal marks mean equal content."""

    identity: str
    size: int
    grows: bool
    """Whether a larger log of the same identity begins with this one's bytes."""

    def continues(self, before: "LogMark") -> bool:
        return self.grows and self.identity == before.identity and self.size >= before.size


@runtime_checkable
class OpenFile(Protocol):
    """A file that does not change, read by position from any thread."""

    def read(self, offset: int, length: int) -> Buffer:
        """Returns exactly these bytes, valid until the same thread reads again. Raises DamagedError when there are
        fewer."""
        ...

    def forget(self, offset: int, length: int) -> bool:
        """Drops a cached copy of these bytes that turned out wrong. Returns whether there was one, so that reading
        again may help."""
        ...


@runtime_checkable
class Files(Protocol):
    """A folder of files."""

    name: str
    """The location as the user wrote it, for messages."""

    def read(self, path: str) -> bytes:
        """Returns a whole file. Raises FileNotFoundError when there is none."""
        ...

    def open(self, path: str, size: int, crc: int | None = None) -> OpenFile:
        """Opens a committed file of `size` bytes. Raises DamagedError when it is missing or of another length. With the
        committed crc32, a cached copy of earlier reads may be used where reading is slow."""
        ...

    def write(self, path: str, pieces: Iterable[Buffer]) -> None:
        """Writes a file made of all the pieces. It is durable when this returns; after a failure the old content is
        still there."""
        ...

    def together(self) -> AbstractContextManager[Write]:
        """Yields a function that writes files which belong together, from any thread. They are durable when the block
        is left, which costs a disk far less than one by one. After a failure in the block, none of them exists."""
        ...

    def append(self, path: str, line: bytes, number: int) -> None:
        """Adds a line to a log, durable when this returns. Where appending is impossible, line `number` becomes a file
        of its own beside the log: see `logs`."""
        ...

    def logs(self, folder: str, prefix: str) -> list[str]:
        """Paths of the logs in a folder whose name begins with `prefix`, sorted."""
        ...

    def marks(self, folder: str, prefix: str) -> dict[str, LogMark]:
        """The paths of `logs`, each with a mark of its present state."""
        ...

    def read_from(self, path: str, offset: int) -> bytes:
        """Returns a file from `offset` to its end. Raises FileNotFoundError when there is none."""
        ...

    def join_logs(self, folder: str, prefix: str) -> None:
        """Joins the logs of one line each, where a line is a file of its own. Every line is in at least one log at any
        moment."""
        ...

    def remove(self, path: str) -> None:
        """Deletes a file; a missing file is no error."""
        ...

    def remove_all(self, paths: list[str]) -> None:
        """Deletes many files."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted."""
        ...

    def clear(self, unwanted: Callable[[str], bool]) -> None:
        """Deletes the files and folders here whose name is unwanted, with all their content."""
        ...

    def check_removable(self, unwanted: Callable[[str], bool]) -> None:
        """Called before `clear`: raises UserError where it could not delete everything."""
        ...

    def at(self, path: str) -> "Files":
        """Returns a folder in this one."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """Marks the store as being read, so that a process that wants to delete it is refused. Writes nothing."""
        ...

    def unread(self) -> AbstractContextManager[None]:
        """Guards deletion of a store. Raises BusyError when another process is reading it, as far as this can be
        seen."""
        ...

    def lock(self, writer: int = 0) -> AbstractContextManager[None]:
        """Allows one writer at a time, or one of each number. Raises BusyError naming the holder."""
        ...

    def at_work(self) -> bool | None:
        """Whether a process or a job writes the store now; None where that cannot be seen."""
        ...

    def explained(self, after: str = ...) -> AbstractContextManager[None]:
        """Turns the errors of a disk or a server into a BusyError if they are temporary, otherwise into a UserError.
        Committed data stays valid. `after` says what to do once the cause is removed."""
        ...


def is_remote(location: str | Path) -> bool:
    return "://" in str(location)


def is_served(location: str | Path) -> bool:
    """Whether a location is a store of an activation cache (`http://HOST:PORT/v1/stores/ID`), or a place in one."""
    return str(location).startswith(("http://", "https://")) and SERVED in str(location)


def parent_of(location: str) -> str | None:
    """The folder that contains a location; None at the top, for a store of an activation cache and for a
    dataset on the hub."""
    if is_hub(location):
        return parent_on_hub(location)
    head, slash, tail = location.rstrip("/").rpartition("/")
    if is_served(location) and not is_served(head):
        return None
    if is_remote(location):
        return head if slash and tail and not head.endswith("/") and head.count("/") >= 2 else None
    parent = os.path.dirname(location.rstrip("/")) or "."
    return None if parent == location else parent


def join(location: str, name: str) -> str:
    return f"{location.rstrip('/')}/{name}" if is_remote(location) else str(Path(location) / name)


def most_bytes(path: str) -> int:
    """The largest size of a file that is read whole."""
    return DOCUMENT_BYTES if path.endswith((".json", ".toml")) else WHOLE_BYTES


def too_large(what: str, size: int, most: int) -> DamagedError:
    return DamagedError(f"{what}: has {size:,} bytes; a file of its kind has at most {most:,}. {VERIFY}")


def safe(path: str) -> str:
    """Returns a path inside a folder unchanged. Raises DamagedError for one that leads out of it."""
    if path[:1] == "/" or path[-1:] == "/" or "//" in path or "\0" in path or ".." in path.split("/"):
        raise DamagedError(f"{path!r}: leads out of the store: it was not written by sagsae. Do not use it")
    return path
