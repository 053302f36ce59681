"""Open files, bounded over the whole process, whatever the number of stores, arrays, readers and threads.

A file that is read repeatedly stays open until other files need the handle: the least recently used one is closed,
never one that is being read. Only regular files are opened here: reading a pipe could wait forever, and a device has no
end.
"""

import contextlib
import errno
import itertools
import os
import resource
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import numpy as np

from shared.errors import DamagedError, UserError

VERIFY: Final = "List all damage with: sagsae store verify"
MAX_OPEN: Final = 4096
MIN_OPEN: Final = 8
TOO_MANY: Final = (errno.EMFILE, errno.ENFILE)
SAFELY: Final = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
TRIES: Final = 100
"""Tries of a call that signals interrupt."""

P = ParamSpec("P")
R = TypeVar("R")
Buffer = bytes | memoryview


def retry_interrupted(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Repeats a call that a signal interrupted: Python does so for reading and writing, not for calls on names."""
    for _ in range(TRIES):
        try:
            return call(*args, **kwargs)
        except InterruptedError:
            time.sleep(0.001)
    return call(*args, **kwargs)


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """Returns a descriptor of a regular file. To be written, the file may be no link and have no other name, so that
    nothing is ever written elsewhere. Closes pooled files when the process may open no more. Raises DamagedError for
    anything that is no regular file, UserError for a link that would be written to, OSError for the rest."""
    return open_to_write(path, flags, mode) if flags & (os.O_WRONLY | os.O_RDWR) else open_to_read(path)[0]


def open_to_read(path: Path) -> tuple[int, os.stat_result]:
    """Returns a descriptor and the file's status. Raises as `open_regular` does."""
    try:
        handle = os.open(path, SAFELY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (*TOO_MANY, errno.ELOOP, errno.EMLINK, errno.EINTR, errno.ENXIO):
            raise
        # opening a device through a link can have side effects
        check_regular(path, retry_interrupted(os.stat, path).st_mode)
        handle = HANDLES.with_free_handle(lambda: retry_interrupted(os.open, path, SAFELY))
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        close(handle)
        check_regular(path, status.st_mode)
    return handle, status


def open_to_write(path: Path, flags: int, mode: int) -> int:
    with contextlib.suppress(FileNotFoundError):
        check_own(path, retry_interrupted(os.lstat, path))
    try:
        handle = HANDLES.with_free_handle(
            lambda: retry_interrupted(os.open, path, flags | SAFELY | os.O_NOFOLLOW, mode)
        )
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # replaced by a link since the check
            raise no_place(path) from error
        raise
    try:
        check_own(path, os.fstat(handle))
    except BaseException:
        close(handle)
        raise
    return handle


def check_own(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise no_place(path)


def no_place(path: Path) -> UserError:
    return UserError(
        f"{path}: is a link, has a second name (hard link) or is no regular file; nothing is written through it, "
        "because its target may lie elsewhere. Remove it, or put a copy in its place"
    )


def check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise DamagedError(f"{path}: is a device, a pipe or a socket, not a file. Put the file in its place")


def close(handle: int) -> None:
    """Closes a descriptor, even where a signal interrupts the call."""
    with contextlib.suppress(InterruptedError):
        os.close(handle)


class Scratch(threading.local):
    """One buffer per thread for compressed bytes, as large as the largest request so far."""

    def __init__(self) -> None:
        self.buffer = memoryview(b"")

    def take(self, length: int) -> memoryview:
        if len(self.buffer) < length:
            self.buffer = memoryview(np.empty(length, np.uint8))  # type: ignore[arg-type]  # not filled with zeros
        return self.buffer[:length]


SCRATCH: Final = Scratch()


class PooledHandle:
    """An open file and the number of threads that read it now."""

    __slots__ = ("number", "users")

    def __init__(self, number: int) -> None:
        self.number, self.users = number, 1


class HandlePool:
    """The open files of a process. `limit` returns how many may be open; it is called whenever one more is opened."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self.limit, self.most = limit, MAX_OPEN
        self.lock = threading.Lock()
        self.open: OrderedDict[int, PooledHandle] = OrderedDict()
        """Open files by key, the least recently used first."""
        self.left: deque[int] = deque()
        """Keys of files without an owner. The next thread that takes the lock closes them, because an object can be
        collected at any moment, even while this thread holds the lock."""

    def take(self, file: "LocalFile") -> PooledHandle:
        """Returns the open file, which stays open until `give`."""
        with self.lock:
            found = self.open.get(file.key)
            if found is not None:
                self.open.move_to_end(file.key)
                found.users += 1
                return found
        if len(self.open) >= MIN_OPEN or self.left:
            self.close_idle(max(MIN_OPEN, min(self.limit(), self.most)) - 1)
        number = file.opened()
        with self.lock:
            other = self.open.get(file.key)
            if other is None:
                made = self.open[file.key] = PooledHandle(number)
                return made
            other.users += 1  # another thread was first
        close(number)
        return other

    def give(self, handle: PooledHandle) -> None:
        with self.lock:
            handle.users -= 1

    def forget(self, key: int) -> None:
        """Called when a file object is collected. Never waits for the lock."""
        self.left.append(key)
        if self.lock.acquire(blocking=False):
            try:
                unused = self.take_left()
            finally:
                self.lock.release()
            for handle in unused:
                with contextlib.suppress(OSError):  # it was only read: nothing is lost, and no caller could handle it
                    close(handle.number)

    def take_left(self) -> list[PooledHandle]:
        """Under the lock: removes the files without an owner and returns them."""
        found = []
        while self.left:
            handle = self.open.pop(self.left.popleft(), None)
            if handle is not None:
                found.append(handle)
        return found

    def close_idle(self, most: int) -> int:
        """Closes the least recently used idle files until at most `most` are open. Returns how many were closed."""
        with self.lock:
            idle = self.take_left()
            surplus = len(self.open) - most
            if surplus > 0:
                keys = itertools.islice((key for key, handle in self.open.items() if not handle.users), surplus)
                idle += [self.open.pop(key) for key in list(keys)]
        for handle in idle:
            close(handle.number)
        return len(idle)

    def with_free_handle(self, call: Callable[[], R]) -> R:
        """Calls a function that opens something. When the process, or the machine, may open no more, half of the pooled
        files are closed and the call is repeated, until it succeeds or none is left."""
        while True:
            try:
                return call()
            except OSError as error:
                if error.errno not in TOO_MANY or not self.close_idle(len(self.open) // 2):
                    raise
                self.most = max(MIN_OPEN, len(self.open))


def half_of_the_limit() -> int:
    """Files that the pool may keep open. The other half is for everything else that the process opens."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN if soft == resource.RLIM_INFINITY else min(MAX_OPEN, soft // 2)


HANDLES: Final = HandlePool(half_of_the_limit)
KEYS: Final = itertools.count()


class LocalFile:
    """A committed file of known length. It is opened to be read, and stays open while the pool has capacity."""

    __slots__ = ("key", "modified", "path", "size")

    def __init__(self, path: Path, size: int) -> None:
        """Raises DamagedError when the file is missing or of another length."""
        self.path, self.size, self.key = path, size, next(KEYS)
        self.modified: int | None = None
        HANDLES.give(HANDLES.take(self))

    def __del__(self) -> None:
        HANDLES.forget(self.key)

    def opened(self) -> int:
        """Returns a new descriptor. Raises DamagedError when another file has the name now."""
        try:
            handle, found = open_to_read(self.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(f"{self.path}: is committed but missing. {VERIFY}") from error
        if found.st_size == self.size and self.modified in (None, found.st_mtime_ns):
            self.modified = found.st_mtime_ns
            return handle
        close(handle)
        if found.st_size != self.size:
            raise DamagedError(f"{self.path}: has {found.st_size} bytes, {self.size} were committed. {VERIFY}")
        raise DamagedError(f"{self.path}: was replaced while it was being read. Run the command again")

    def read(self, offset: int, length: int) -> Buffer:
        handle = HANDLES.take(self)
        try:
            return self.read_from(handle.number, offset, length)
        finally:
            HANDLES.give(handle)

    def read_from(self, handle: int, offset: int, length: int) -> Buffer:
        buffer, done = SCRATCH.take(length), 0
        while done < length:  # the kernel returns at most 2 GiB per call
            try:
                more = os.preadv(handle, [buffer[done:]], offset + done)
            except OSError as error:
                raise DamagedError(f"{self.path}: cannot be read ({error.strerror}). Check the disk") from error
            if not more:
                raise DamagedError(f"{self.path}: ends after {offset + done} bytes. {VERIFY}")
            done += more
        return buffer

    def forget(self, offset: int, length: int) -> bool:  # noqa: ARG002 (a disk keeps no copies)
        return False
