"""Where bytes are: one set of verbs for a local folder (here) and for an object store (shared/remote.py).

Files are whole or absent, whatever is killed when: write to a temporary name, fsync, rename, fsync the folder. What was
committed is read by position, with the length that was committed; a file of another length is damage. Paths are
relative to the folder, with `/`.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from shared.errors import DamagedError, UserError

LOCK_FILE: Final = ".lock"
VERIFY: Final = "List all damage with: sagsae store verify"

Buffer = bytes | memoryview
Write = Callable[[str, Iterable[Buffer]], None]
"""Writes a file of all the pieces."""


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

    def remove(self, path: str) -> None:
        """Deletes a file; none is fine."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted."""
        ...

    def clear(self, unwanted: Callable[[str], bool]) -> None:
        """Deletes the files and folders here whose name is unwanted, with all that is in them."""
        ...

    def at(self, path: str) -> "Files":
        """A folder in this one."""
        ...

    def lock(self, writer: int = 0) -> AbstractContextManager[None]:
        """One writer at a time, or one of each number. Raises UserError naming the holder."""
        ...

    def explained(self) -> AbstractContextManager[None]:
        """Turns what a disk or a server can do to a writer into a UserError; what is committed stays valid."""
        ...


def is_remote(location: str | Path) -> bool:
    return "://" in str(location)


def open_files(location: str | Path) -> Files:
    """The files at a folder (its `~` made whole) or a URL (s3://, gs://, http://, https://)."""
    if not is_remote(location):
        return LocalFiles(Path(os.path.expanduser(location)))
    from shared.remote import RemoteFiles

    return RemoteFiles.connect(str(location))


def parent_of(location: str) -> str | None:
    """The folder that a location is in; None at the top."""
    head, slash, tail = location.rstrip("/").rpartition("/")
    if is_remote(location):
        return head if slash and tail and not head.endswith("/") and head.count("/") >= 2 else None
    parent = os.path.dirname(location.rstrip("/")) or "."
    return None if parent == location else parent


def join(location: str, name: str) -> str:
    return f"{location.rstrip('/')}/{name}" if is_remote(location) else str(Path(location) / name)


class Scratch(threading.local):
    """One buffer a thread for compressed bytes, as large as the largest that it was asked for."""

    def __init__(self) -> None:
        self.buffer = memoryview(b"")

    def take(self, length: int) -> memoryview:
        if len(self.buffer) < length:
            self.buffer = memoryview(np.empty(length, np.uint8))  # type: ignore[arg-type]  # not filled with zeros
        return self.buffer[:length]


SCRATCH: Final = Scratch()


class LocalFile:
    """A file descriptor that closes itself when nobody uses it any more."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self.handle = path, handle

    def __del__(self) -> None:
        os.close(self.handle)

    def read(self, offset: int, length: int) -> Buffer:
        buffer, done = SCRATCH.take(length), 0
        while done < length:  # the kernel gives at most 2 GiB at a time
            try:
                more = os.preadv(self.handle, [buffer[done:]], offset + done)
            except OSError as error:
                raise DamagedError(f"{self.path}: cannot be read ({error.strerror}). Check the disk") from error
            if not more:
                raise DamagedError(f"{self.path}: ends after {offset + done} bytes. {VERIFY}")
            done += more
        return buffer

    def forget(self, offset: int, length: int) -> bool:  # noqa: ARG002 (a disk keeps no copies)
        return False


class LocalFiles:
    """A folder on a disk."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)

    def read(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(str(error)) from error

    def open(self, path: str, size: int, crc: int | None = None) -> OpenFile:  # noqa: ARG002 (a disk is fast)
        file = self.root / path
        try:
            handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(f"{file}: is committed but missing. {VERIFY}") from error
        opened = LocalFile(file, handle)
        found = os.fstat(handle).st_size
        if found != size:
            raise DamagedError(f"{file}: has {found} bytes, {size} were committed. {VERIFY}")
        return opened

    def write(self, path: str, pieces: Iterable[Buffer]) -> None:
        write_file(self.root / path, pieces)

    @contextmanager
    def together(self) -> Iterator[Write]:
        with written_together() as write:
            yield lambda path, pieces: write(self.root / path, pieces)

    def append(self, path: str, line: bytes, number: int) -> None:  # noqa: ARG002 (a disk can append)
        file = self.root / path
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            end = os.lseek(handle, 0, os.SEEK_END)
            if end and os.pread(handle, 1, end - 1) != b"\n":  # torn by a crash: it was never a line
                end = os.pread(handle, end, 0).rfind(b"\n") + 1
                os.ftruncate(handle, end)
            try:
                if os.pwrite(handle, line, end) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
        sync(file.parent)

    def logs(self, folder: str, prefix: str) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in (self.root / folder).glob(f"{prefix}*.jsonl"))

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def clear(self, unwanted: Callable[[str], bool]) -> None:
        for path in self.root.iterdir():
            if unwanted(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def at(self, path: str) -> Files:
        return LocalFiles(self.root / path)

    def lock(self, writer: int = 0) -> AbstractContextManager[None]:
        return folder_lock(self.root, lock_file(writer))

    def explained(self) -> AbstractContextManager[None]:
        return explained(self.root)


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, pieces: bytes | Iterable[Buffer]) -> None:
    """A file of all the pieces, or nothing."""
    with written_together() as write:
        write(path, [pieces] if isinstance(pieces, bytes) else pieces)


@contextmanager
def written_together() -> Iterator[Callable[[Path, Iterable[Buffer]], None]]:
    """Files, or nothing: all to temporary names, then fsync of all, renames, and fsync of each folder once. The first
    fsync takes the journal's part of the others with it."""
    names: dict[Path, Path] = {}
    folders: set[Path] = set()

    def write(path: Path, pieces: Iterable[Buffer]) -> None:
        folders.update(make_folders(path.parent), (path.parent,))
        names[path] = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with names[path].open("wb", buffering=0) as file:
            for piece in pieces:
                view = memoryview(piece)
                while len(view):
                    view = view[file.write(view) :]

    try:
        yield write
        for temporary in names.values():
            sync(temporary)
        for path, temporary in names.items():
            temporary.rename(path)
    except BaseException:
        for temporary in names.values():
            with contextlib.suppress(OSError):  # the first failure is the one to tell
                temporary.unlink(missing_ok=True)
        raise
    for folder in folders:
        sync(folder)


def make_folders(folder: Path) -> list[Path]:
    """Like mkdir -p. Gives the folders that have a new name in them: to be synced."""
    if folder.is_dir():
        return []
    above = make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    return [*above, folder.parent]


def remove_temporaries(root: Path) -> None:
    """Deletes what was being written when a process was killed. For whoever holds the lock."""
    for leftover in root.rglob("*.tmp"):
        leftover.unlink(missing_ok=True)


def lock_file(writer: int) -> str:
    return f"{LOCK_FILE}.{writer}" if writer else LOCK_FILE


@contextmanager
def folder_lock(root: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """One writer of a folder at a time. The lock dies with its process. Raises UserError naming the holder."""
    with (root / name).open("ab+", buffering=0) as file:
        take_flock(file, root)
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name in it
            file.truncate(0)
            file.write(this_process().encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def take_flock(file: Any, root: Path) -> None:
    for last in (False, True):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if last:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                raise UserError(f"{root}: {holder} is writing here; wait for it, or stop it first") from error
            time.sleep(0.05)  # `is_locked` holds it for a moment
    return None


def check_alone(root: Path) -> None:
    """For whoever holds the lock of writer 0. Raises UserError when another writer is still at work: the rest of a
    harvest whose first process was killed."""
    for path in sorted(root.glob(f"{LOCK_FILE}.*")):
        with folder_lock(root, path.name):
            pass


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_locked(root: Path) -> bool:
    """Whether a process that is alive holds the folder's lock."""
    try:
        with (root / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


REASONS: Final = {
    errno.ENOSPC: "the disk is full. Free space",
    errno.EDQUOT: "the disk quota is used up. Free space",
    errno.EFBIG: "a file would be larger than is allowed here. Raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only. Make it writable",
    errno.EACCES: "permission denied. Make the folder writable",
    errno.EPERM: "permission denied. Make the folder writable",
    errno.EIO: "the disk reports an error (I/O error). Check the disk",
}


@contextmanager
def explained(where: Any) -> Iterator[None]:
    """Turns a full disk or a read-only one into a message; what is committed stays valid."""
    try:
        yield
    except OSError as error:
        if error.errno not in REASONS:
            raise
        raise UserError(
            f"{where}: {REASONS[error.errno]}, then run the same command again: what is committed is safe and stays"
        ) from error
