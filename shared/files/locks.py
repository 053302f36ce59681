"""Locks that say who may write into a folder and who is reading it; they end with their process.

A writer holds `.lock` (flock). Some file systems have no flock (Lustre without `-o flock`, NFS without its lock
service). There a second file replaces the lock, which only one process can create. It stays when its process is killed,
and then a message says which file to delete. A process that reads a store for long holds a shared lock on its
record.json; nothing is written for that, and a process that wants to delete the store is refused.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from shared.errors import BusyError, UserError
from shared.files.handles import close, open_regular, retry_interrupted
from shared.progress import say

LOCK_FILE: Final = ".lock"
HELD_FILE: Final = ".lock.held"
"""Replaces the lock where there is no flock."""
READ_FILE: Final = "record.json"
"""The file that readers lock: written once, never replaced."""
NO_FLOCK: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
WAIT_SECONDS: Final = 0.05
"""Pause before a second try, because `is_locked` holds a lock for a moment."""


class NoFlockError(Exception):
    """This file system has no flock."""


def lock_file(writer: int) -> str:
    return f"{LOCK_FILE}.{writer}" if writer else LOCK_FILE


def flock(handle: int, how: int) -> bool:
    """Returns whether the lock was free; does not wait for it. Raises NoFlockError."""
    try:
        retry_interrupted(fcntl.flock, handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        raise NoFlockError(os.strerror(error.errno)) from error
    return True


@contextmanager
def folder_lock(root: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Allows one writer of a folder at a time. The lock ends with its process. Raises BusyError naming the holder,
    UserError where the lock's file is a link."""
    handle = open_regular(root / name, os.O_RDWR | os.O_CREAT)
    try:
        other = root / name.replace(LOCK_FILE, HELD_FILE, 1)
        try:
            take_flock(handle, root)
        except NoFlockError:
            with exclusive_file(other, root):
                check_name(handle, root / name, root)
                yield
            return
        if other.exists():  # some servers have flock only at times
            raise held_error(other, root)
        with contextlib.suppress(OSError):  # on a full disk the lock works without a name in it
            os.ftruncate(handle, 0)
            os.pwrite(handle, this_process().encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
    finally:
        close(handle)


def take_flock(handle: int, root: Path) -> None:
    for last in (False, True):
        if flock(handle, fcntl.LOCK_EX):
            return
        if not last:
            time.sleep(WAIT_SECONDS)
    name = os.pread(handle, 200, 0).decode(errors="replace").strip()
    raise BusyError(f"{root}: {printable(name) or 'another process'} is writing here; wait for it, or stop it first")


def printable(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable())


@contextmanager
def exclusive_file(file: Path, root: Path) -> Iterator[None]:
    """A lock without flock: a file that only one process can create. Raises BusyError naming the holder, UserError
    for one that was killed."""
    mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "processes": process_space()}).encode()
    try:
        handle = open_regular(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError as error:
        raise held_error(file, root) from error
    try:
        try:
            os.write(handle, mine)
        finally:
            close(handle)
        yield
    finally:
        with contextlib.suppress(OSError):
            retry_interrupted(file.unlink, missing_ok=True)


def check_name(handle: int, file: Path, root: Path) -> None:
    """Called where flock does not work now: raises BusyError when the file names a holder that locked it with flock and
    may still be alive."""
    text = os.pread(handle, 200, 0).decode(errors="replace").strip()
    found = re.fullmatch(r"process (\d+) on (.+)", text)
    if text and not (found and found[2] == socket.gethostname() and not is_alive(int(found[1]))):
        raise BusyError(
            f"{root}: {printable(text)} is writing here; wait for it, or stop it first. If it is known to be dead, "
            f"delete {file} (this file system has no flock)"
        )


def held_error(file: Path, root: Path) -> UserError:
    """The error of a folder that another process has locked with a file. Waiting helps unless that process is dead."""
    held = lock_content(first_bytes(file))
    who = printable(f"process {held.get('pid')} on {held.get('host')}") if held else "another process"
    if is_dead(held):
        return UserError(
            f"{root}: {who} was writing here and was killed. Delete {file} (this file system has no flock), then try "
            "again"
        )
    return BusyError(
        f"{root}: {who} is writing here; wait for it, or stop it first. If it is known to be dead, delete {file} (this "
        "file system has no flock)"
    )


def first_bytes(file: Path) -> bytes:
    try:
        handle = open_regular(file)
    except OSError:
        return b""
    try:
        return os.read(handle, 4096)
    finally:
        close(handle)


def check_alone(root: Path) -> None:
    """Called by the holder of writer 0's lock. Raises BusyError when another writer is still at work: the rest of a
    harvest whose first process was killed."""
    for path in sorted(root.glob(f"{LOCK_FILE}.[0-9]*")):
        with folder_lock(root, path.name):
            pass


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_locked(root: Path) -> bool | None:
    """Whether a living process holds the folder's lock; None where that cannot be seen."""
    if (root / LOCK_FILE).is_symlink() or (root / HELD_FILE).exists():
        return None
    try:
        handle = open_regular(root / LOCK_FILE)
    except FileNotFoundError:
        return False
    try:
        return not flock(handle, fcntl.LOCK_SH)
    except NoFlockError:
        return None
    finally:
        close(handle)


@contextmanager
def held_for_reading(root: Path) -> Iterator[None]:
    """Holds a shared lock while a store is read. Raises BusyError when the store is being deleted. Where locking is
    impossible, it is read without a lock."""
    try:
        handle = open_regular(root / READ_FILE)
    except FileNotFoundError:
        yield
        return
    try:
        with contextlib.suppress(NoFlockError):
            for last in (False, True):
                if flock(handle, fcntl.LOCK_SH):
                    break
                if last:
                    raise BusyError(f"{root}: is being deleted or repaired by another process. Wait for it")
                time.sleep(WAIT_SECONDS)
        yield
    finally:
        close(handle)


@contextmanager
def check_unread(root: Path) -> Iterator[None]:
    """Raises BusyError when a process reads the store, and keeps new readers away."""
    try:
        handle = open_regular(root / READ_FILE)
    except FileNotFoundError:
        yield
        return
    try:
        try:
            if not flock(handle, fcntl.LOCK_EX):
                raise BusyError(
                    f"{root}: {reading_processes(handle)} reading it (a training, an evaluation, a verify …). Wait for "
                    "it, or stop it first"
                )
        except NoFlockError as error:
            say(f"{root}: this file system does not show whether another process is reading it ({error})")
        yield
    finally:
        close(handle)


def reading_processes(handle: int) -> str:
    """The processes that hold a lock of this file, as far as this machine knows."""
    status = os.fstat(handle)
    wanted = f":{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    found = {line.split()[4] for line in lines if "FLOCK" in line and line.split()[5].endswith(wanted)}
    found -= {str(os.getpid()), "-1", "0"}
    if not found:
        return "another process is"
    return f"process {', '.join(sorted(found))} is" if len(found) == 1 else f"processes {', '.join(sorted(found))} are"


def lock_content(data: bytes) -> dict[str, Any]:
    """The content of a lock's file; {} when it has none."""
    with contextlib.suppress(ValueError, RecursionError):
        held = json.loads(data)
        if isinstance(held, dict):
            return held
    return {}


def is_dead(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine and has ended. False for any other machine."""
    here = held.get("host") == socket.gethostname() and held.get("processes") == process_space()
    pid = held.get("pid")
    return here and isinstance(pid, int) and pid > 0 and not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether this machine has such a process; True when that is unknown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def process_space() -> str:
    """The PID namespace of this process: two containers can have the same host name."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
