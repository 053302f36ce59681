"""Open files, bounded over the whole process, whatever the number of stores, arrays, readers and threads.

A file that is read again and again stays open until others are wanted more: the least recently used one is closed,
never one that is being read. Only regular files are opened here: a pipe would wait for ever, a device would never end.
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
MOST_OPEN: Final = 4096
LEAST_OPEN: Final = 8
TOO_MANY: Final = (errno.EMFILE, errno.ENFILE)
SAFELY: Final = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
TRIES: Final = 100
"""Of a call that signals break off."""

P = ParamSpec("P")
R = TypeVar("R")
Buffer = bytes | memoryview


def again(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The call, made again when a signal broke it off: Python does so for reading and writing, not for names."""
    for _ in range(TRIES):
        try:
            return call(*args, **kwargs)
        except InterruptedError:
            time.sleep(0.001)
    return call(*args, **kwargs)


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """A descriptor of a regular file. To write, the file may be no link and have no other name: what is written here
    never lands elsewhere. Closes files of the pool when the process may open no more. Raises DamagedError for what is
    no regular file, UserError for a link to be written to, OSError for the rest."""
    return open_to_write(path, flags, mode) if flags & (os.O_WRONLY | os.O_RDWR) else open_to_read(path)[0]


def open_to_read(path: Path) -> tuple[int, os.stat_result]:
    """With what is known of the file. Raises as `open_regular` does."""
    try:
        handle = os.open(path, SAFELY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (*TOO_MANY, errno.ELOOP, errno.EMLINK, errno.EINTR, errno.ENXIO):
            raise
        check_regular(path, again(os.stat, path).st_mode)  # opening a device that a link names can have effects
        handle = HANDLES.with_room(lambda: again(os.open, path, SAFELY))
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        close(handle)
        check_regular(path, status.st_mode)
    return handle, status


def open_to_write(path: Path, flags: int, mode: int) -> int:
    with contextlib.suppress(FileNotFoundError):
        check_own(path, again(os.lstat, path))
    try:
        handle = HANDLES.with_room(lambda: again(os.open, path, flags | SAFELY | os.O_NOFOLLOW, mode))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # it became a link just now
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
        "because what it stands for may lie elsewhere. Remove it, or put a copy in its place"
    )


def check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise DamagedError(f"{path}: is a device, a pipe or a socket, not a file. Put the file in its place")


def close(handle: int) -> None:
    """Closed even where a signal breaks the call off."""
    with contextlib.suppress(InterruptedError):
        os.close(handle)


class Scratch(threading.local):
    """One buffer a thread for compressed bytes, as large as the largest that it was asked for."""

    def __init__(self) -> None:
        self.buffer = memoryview(b"")

    def take(self, length: int) -> memoryview:
        if len(self.buffer) < length:
            self.buffer = memoryview(np.empty(length, np.uint8))  # type: ignore[arg-type]  # not filled with zeros
        return self.buffer[:length]


SCRATCH: Final = Scratch()


class PooledHandle:
    """An open file and how many threads read it now."""

    __slots__ = ("number", "users")

    def __init__(self, number: int) -> None:
        self.number, self.users = number, 1


class HandlePool:
    """The open files of a process. `limit` says how many may be open; it is asked whenever one more is opened."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self.limit, self.most = limit, MOST_OPEN
        self.lock = threading.Lock()
        self.open: OrderedDict[int, PooledHandle] = OrderedDict()
        """By the file's key, the least recently used first."""
        self.left: deque[int] = deque()
        """Keys of files that nobody has any more. Whoever takes the lock next closes them: an object can end in the
        middle of anything, also while this thread holds the lock."""

    def take(self, file: "LocalFile") -> PooledHandle:
        """The open file, which stays open until `give`."""
        with self.lock:
            found = self.open.get(file.key)
            if found is not None:
                self.open.move_to_end(file.key)
                found.users += 1
                return found
        if len(self.open) >= LEAST_OPEN or self.left:
            self.close_idle(max(LEAST_OPEN, min(self.limit(), self.most)) - 1)
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
        """For a file that ends. Never waits for the lock."""
        self.left.append(key)
        if self.lock.acquire(blocking=False):
            try:
                unused = self.take_left()
            finally:
                self.lock.release()
            for handle in unused:
                with contextlib.suppress(OSError):  # it was only read: nothing is lost, and nobody could be told
                    close(handle.number)

    def take_left(self) -> list[PooledHandle]:
        """Under the lock: takes out what nobody has any more."""
        found = []
        while self.left:
            handle = self.open.pop(self.left.popleft(), None)
            if handle is not None:
                found.append(handle)
        return found

    def close_idle(self, most: int) -> int:
        """Closes the least recently used files that nobody is reading until at most so many are open. Gives how many
        were closed."""
        with self.lock:
            idle = self.take_left()
            surplus = len(self.open) - most
            if surplus > 0:
                keys = itertools.islice((key for key, handle in self.open.items() if not handle.users), surplus)
                idle += [self.open.pop(key) for key in list(keys)]
        for handle in idle:
            close(handle.number)
        return len(idle)

    def with_room(self, call: Callable[[], R]) -> R:
        """A call that opens something. Where the process, or the machine, may open no more, half of the files here are
        closed, and again until it goes or none is left."""
        while True:
            try:
                return call()
            except OSError as error:
                if error.errno not in TOO_MANY or not self.close_idle(len(self.open) // 2):
                    raise
                self.most = max(LEAST_OPEN, len(self.open))


def half_of_the_limit() -> int:
    """Files that this process may keep open here. The other half is for what is open besides."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if soft == resource.RLIM_INFINITY else min(MOST_OPEN, soft // 2)


HANDLES: Final = HandlePool(half_of_the_limit)
KEYS: Final = itertools.count()


class LocalFile:
    """A committed file of a known length. It is open when it is read, and stays so while there is room."""

    __slots__ = ("key", "modified", "path", "size")

    def __init__(self, path: Path, size: int) -> None:
        """Raises DamagedError when it is missing or of another length."""
        self.path, self.size, self.key = path, size, next(KEYS)
        self.modified: int | None = None
        HANDLES.give(HANDLES.take(self))

    def __del__(self) -> None:
        HANDLES.forget(self.key)

    def opened(self) -> int:
        """A new descriptor. Raises DamagedError when what has the name now is not what had it before."""
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
        while done < length:  # the kernel gives at most 2 GiB at a time
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
