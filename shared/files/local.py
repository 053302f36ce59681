"""A folder on a disk, with the operations of shared/files/base.py.

A file is whole or absent, whenever a process is killed: it is written under a temporary name, synced and renamed, and
then the folder is synced.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

from shared.errors import BusyError, UserError
from shared.files.base import AGAIN, Files, LogMark, OpenFile, Write, most_bytes, safe, too_large
from shared.files.handles import HANDLES, Buffer, LocalFile, close, open_regular, open_to_read, retry_interrupted
from shared.files.locks import check_unread, folder_lock, held_for_reading, is_locked, lock_file
from shared.progress import say


class LocalFiles:
    """A folder on a disk."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)

    def read(self, path: str) -> bytes:
        try:
            return read_whole(self.root / safe(path), most_bytes(path))
        except NotADirectoryError as error:
            raise FileNotFoundError(str(error)) from error

    def open(self, path: str, size: int, crc: int | None = None) -> OpenFile:  # noqa: ARG002 (a disk is fast)
        return LocalFile(self.root / safe(path), size)

    def write(self, path: str, pieces: Iterable[Buffer]) -> None:
        write_file(self.place(path), pieces)

    @contextmanager
    def together(self) -> Iterator[Write]:
        with written_together() as write:
            yield lambda path, pieces: write(self.place(path), pieces)

    def place(self, path: str) -> Path:
        """The path at which a file is written. Raises UserError where a folder on the way is a link that leads out of
        this one."""
        file = self.root / safe(path)
        real, top = os.path.realpath(file.parent), os.path.realpath(self.root)
        if real != top and not real.startswith(f"{top.rstrip('/')}/"):
            raise UserError(
                f"{file.parent}: leads out of {self.name} ({real}). Linked folders are read, never written to. Put the "
                "folder itself in the link's place, or link the whole store"
            )
        return file

    def append(self, path: str, line: bytes, number: int) -> None:  # noqa: ARG002 (a disk can append)
        file = self.place(path)
        append_line(file, line)
        sync(file.parent)

    def logs(self, folder: str, prefix: str) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in (self.root / folder).glob(f"{prefix}*.jsonl"))

    def marks(self, folder: str, prefix: str) -> dict[str, LogMark]:
        found = {}
        for path in self.logs(folder, prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted since the listing
                about = (self.root / path).stat()
                found[path] = LogMark(f"{about.st_dev} {about.st_ino}", about.st_size, True)
        return found

    def read_from(self, path: str, offset: int) -> bytes:
        return read_whole(self.root / safe(path), most_bytes(path), offset)

    def join_logs(self, folder: str, prefix: str) -> None:
        pass  # a log is one file

    def remove(self, path: str) -> None:
        retry_interrupted((self.root / safe(path)).unlink, missing_ok=True)

    def remove_all(self, paths: list[str]) -> None:
        for path in paths:
            self.remove(path)

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def clear(self, unwanted: Callable[[str], bool]) -> None:
        for path in list(self.root.iterdir()):
            if unwanted(path.name):
                remove_tree(path)

    def check_removable(self, unwanted: Callable[[str], bool]) -> None:
        check_removable(path for path in self.root.iterdir() if unwanted(path.name))

    def at(self, path: str) -> Files:
        return LocalFiles(self.root / safe(path))

    def lock(self, writer: int = 0) -> AbstractContextManager[None]:
        return folder_lock(self.root, lock_file(writer))

    def reading(self) -> AbstractContextManager[None]:
        return held_for_reading(self.root)

    def unread(self) -> AbstractContextManager[None]:
        return check_unread(self.root)

    def at_work(self) -> bool | None:
        return is_locked(self.root)

    def explained(self, after: str = AGAIN) -> AbstractContextManager[None]:
        return explained(self.root, after)


def read_whole(file: Path, most: int, offset: int = 0) -> bytes:
    """Returns a regular file from `offset` to its end. Raises DamagedError for one that is larger than `most` bytes, or
    no regular file."""
    handle, status = open_to_read(file)
    try:
        if status.st_size > most:
            raise too_large(str(file), status.st_size, most)
        parts, left = [], most + 1 - os.lseek(handle, offset, os.SEEK_SET)
        while left > 0 and (part := os.read(handle, min(left, status.st_size + 1))):
            parts.append(part)
            left -= len(part)
            if left <= most - status.st_size:  # the file's length at the start; later additions are read next time
                break
        if left <= 0:
            raise too_large(str(file), most + 1, most)
        return b"".join(parts)
    finally:
        close(handle)


def touch(file: Path) -> None:
    """Creates an empty file where there is none. Raises UserError for a link."""
    close(open_regular(file, os.O_WRONLY | os.O_CREAT))


def append_line(file: Path, line: bytes) -> None:
    """Adds a line to a log, durable when this returns. A torn last line is removed first. Raises UserError where the
    log is a link."""
    handle = open_regular(file, os.O_RDWR | os.O_CREAT)
    try:
        end = os.lseek(handle, 0, os.SEEK_END)
        if end and os.pread(handle, 1, end - 1) != b"\n":  # a crash cut the line off: it was never committed
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
        close(handle)


def remove_tree(path: Path) -> None:
    """Deletes a file or a folder with all its content. A link is removed itself; its target stays, and is named."""
    if path.is_symlink():
        target = os.path.realpath(path)
        retry_interrupted(path.unlink, missing_ok=True)
        say(f"{path}: was a link and is removed; its target {target} is left as it is")
    elif path.is_dir():
        retry_interrupted(shutil.rmtree, path)
    else:
        retry_interrupted(path.unlink, missing_ok=True)


def check_removable(paths: Iterable[Path]) -> None:
    """Called before anything is deleted: raises UserError where deletion would fail. It checks the folders, not their
    content."""
    for path in paths:
        holds = [path.parent, *([path] if path.is_dir() and not path.is_symlink() else [])]
        for folder in holds:
            if not os.access(folder, os.W_OK | os.X_OK):
                raise UserError(
                    f"{path}: cannot be deleted, because {folder} may not be changed. Nothing was deleted. Make the "
                    "folder writable"
                )


def sync(path: Path) -> None:
    """Syncs a file or a folder (fsync)."""
    handle = HANDLES.with_free_handle(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
    try:
        os.fsync(handle)
    finally:
        close(handle)


def write_file(path: Path, pieces: bytes | Iterable[Buffer]) -> None:
    """Writes a file made of all the pieces, or nothing."""
    with written_together() as write:
        write(path, [pieces] if isinstance(pieces, bytes) else pieces)


@contextmanager
def written_together() -> Iterator[Callable[[Path, Iterable[Buffer]], None]]:
    """Writes several files, or none: all under temporary names, then one fsync each, renames, and one fsync per folder.
    The first fsync flushes the journal for the others too."""
    names: dict[Path, Path] = {}
    folders: set[Path] = set()

    def write(path: Path, pieces: Iterable[Buffer]) -> None:
        folders.update(make_folders(path.parent), (path.parent,))
        names[path] = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        write_new(names[path], pieces)

    try:
        yield write
        for temporary in names.values():
            sync(temporary)
        for path, temporary in names.items():
            retry_interrupted(temporary.rename, path)
    except BaseException:
        for temporary in names.values():
            with contextlib.suppress(OSError):  # the first failure is the one to report
                retry_interrupted(temporary.unlink, missing_ok=True)
        raise
    for folder in folders:
        sync(folder)


def write_new(path: Path, pieces: Iterable[Buffer]) -> None:
    """Writes a file that does not exist; a leftover or a link with its name is removed first."""
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    retry_interrupted(path.unlink, missing_ok=True)
    handle = open_regular(path, new)
    try:
        for piece in pieces:
            view = memoryview(piece)
            while len(view):
                view = view[os.write(handle, view) :]
    except BaseException:
        with contextlib.suppress(OSError):  # the first failure is the one to report
            close(handle)
        raise
    close(handle)


def make_folders(folder: Path) -> list[Path]:
    """Like mkdir -p. Returns the folders that contain a new name and must be synced."""
    if folder.is_dir():
        return []
    above = make_folders(folder.parent)
    retry_interrupted(folder.mkdir, exist_ok=True)
    return [*above, folder.parent]


def remove_temporaries(root: Path, arrays: Iterable[str] = (), written: Collection[int] = ()) -> None:
    """Deletes the temporary files of a killed process, in the places where they can be: beside documents and logs, and
    among the files of shards that are not `written`. The caller holds the lock."""
    places = [root, root / "manifest"]
    for array in arrays:
        folder = root / array
        places += [folder, *folder.parents[: array.count("/") + 1]]
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / "c") as found:
            for entry in found:
                number = entry.name.partition(".")[0]
                if entry.name.endswith(".tmp"):
                    retry_interrupted(Path(entry.path).unlink, missing_ok=True)
                elif number.isdecimal() and int(number) not in written and entry.is_dir(follow_symlinks=False):
                    places.append(Path(entry.path))
    for place in dict.fromkeys(places):
        for leftover in place.glob("*.tmp"):
            retry_interrupted(leftover.unlink, missing_ok=True)


WRITABLE: Final = "permission denied. Make the folder writable"
LIMIT: Final = "Raise the limit (ulimit -n), or stop what else is running"
MOUNT: Final = "the file system does not answer as it should. Check the disk or its server"
REASONS: Final = {
    errno.ENOSPC: "the disk is full. Free space",
    errno.EDQUOT: "the disk quota is used up. Free space",
    errno.EFBIG: "a file would be larger than is allowed here. Raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only. Make it writable",
    errno.EACCES: WRITABLE,
    errno.EPERM: WRITABLE,
    errno.EIO: "the disk reports an error (I/O error). Check the disk",
    errno.EMFILE: f"this process has too many open files. {LIMIT}",
    errno.ENFILE: f"this machine has too many open files. {LIMIT}",
    errno.ENAMETOOLONG: "the name is too long for this file system. Choose a shorter --out or --name",
    errno.ENOENT: "a file or folder that was there a moment ago is gone. Leave the folder alone while this runs",
    errno.ENOTDIR: "a folder is expected, but something else is there. Leave the folder alone while this runs",
    errno.EISDIR: "a file is expected, but a folder is there. Remove it",
    errno.ENOTEMPTY: "another process is writing into the folder. Leave the folder alone while this runs",
    errno.EEXIST: "another process is writing into the folder. Leave the folder alone while this runs",
    errno.ELOOP: "links lead round in a circle. Remove them",
    errno.EXDEV: "the folder lies on two disks. Put all of it on one",
    errno.EINTR: "the file system was interrupted again and again (EINTR)",
    errno.ESTALE: f"{MOUNT} (stale file handle): mount it again",
    errno.ETIMEDOUT: f"{MOUNT} (timed out)",
    errno.EHOSTDOWN: f"{MOUNT} (its server is down)",
    errno.ENOTCONN: f"{MOUNT} (not connected): mount it again",
    errno.ENXIO: f"{MOUNT} (no such device)",
    errno.ENODEV: f"{MOUNT} (no such device)",
    errno.ENOLCK: "the file system has no locks left. Check its server",
    errno.ENOSYS: "the file system cannot do this. Use another disk",
    errno.EOPNOTSUPP: "the file system cannot do this. Use another disk",
    errno.EINVAL: "the file system refuses this. Use another disk",
    errno.EBUSY: "a file is in use by something else (EBUSY). Stop it",
    errno.ETXTBSY: "a file is in use by something else (ETXTBSY). Stop it",
    errno.EBADF: "the disk reports an error when a file is closed. Check the disk",
    errno.ENOMEM: "out of memory. Free some",
}


TEMPORARY: Final = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.ENFILE,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.EINTR,
        errno.EAGAIN,
        errno.ESTALE,
        errno.ENXIO,
        errno.ENODEV,
        errno.ENOLCK,
        errno.EBUSY,
        errno.ETXTBSY,
        errno.ENOMEM,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
    }
)
"""Errors after which the same command can succeed: once there is free disk space, a server is back, a file is free."""


def error_kind(error: OSError) -> type[UserError]:
    """The class of message for an operating-system error: BusyError for a temporary one, otherwise UserError."""
    return BusyError if error.errno in TEMPORARY else UserError


def in_words(error: OSError) -> str:
    """What an operating-system error means, and what to do."""
    return REASONS.get(error.errno or 0) or f"{error.strerror} (error {error.errno}). Check the disk"


@contextmanager
def explained(where: Any, after: str = AGAIN) -> Iterator[None]:
    """Turns a temporary error of the disk (a full one) into a BusyError, any other (a read-only one) into a UserError.
    Committed data stays valid."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise error_kind(error)(f"{where}: {in_words(error)}, {after}") from error
