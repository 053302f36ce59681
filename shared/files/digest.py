"""The BLAKE2b digest of all bytes of a file, cached until the file changes.

The cache is in the user's cache folder: one small file per digest, whose name is a hash of the file's path, size, inode
and both times. Other files found there, or files of another user, are not believed. The digest of a file that changed
within the last seconds is not cached, because its times could not show the next change.
"""

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from shared.device import local_cores
from shared.files.cache import RangeCache
from shared.progress import say

BLOCK: Final = 4 << 20
"""Bytes read at a time."""
SAY_BYTES: Final = 8e9
"""Bytes above which a message announces the reading, because it takes long."""
SETTLED_SECONDS: Final = 3.0
"""Seconds that a file must have stayed unchanged before its digest is cached."""
DIGEST_BYTES: Final = 32


def file_digests(paths: Iterable[Path]) -> list[str]:
    """Returns 64 hex digits over all bytes of each file, in the given order. Raises OSError where one cannot be
    read."""
    found = list(paths)
    unknown = [path for path in found if cached_digest(file_identity(path)) is None]
    size = sum(path.stat().st_size for path in unknown)
    if size > SAY_BYTES:
        say(f"{unknown[-1].parent}: {size / 1e9:.0f} GB are read once, to identify this model by its hash")
    with ThreadPoolExecutor(max(1, min(len(found), local_cores()))) as pool:  # hashlib releases the GIL
        return list(pool.map(file_digest, found))


def file_digest(path: Path) -> str:
    """The digest of one file, as in `file_digests`."""
    before = file_identity(path)
    if cached := cached_digest(before):
        return cached
    place = cache_file(before)
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    found = digest.hexdigest()
    if place and file_identity(path) == before and time.time_ns() - max(before[3:]) > SETTLED_SECONDS * 1e9:
        write_cached(place, before, found)
    return found


def file_identity(path: Path) -> tuple[str, int, int, int, int]:
    """Path, size, inode and times in ns: they tell a file from any other, and from itself before a change."""
    about = path.stat()
    return os.path.realpath(path), about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns


def cached_digest(file: tuple[str, int, int, int, int]) -> str | None:
    place = cache_file(file)
    return read_cached(place, file) if place else None


def cache_file(file: tuple[str, int, int, int, int]) -> Path | None:
    """The cache file for a file's digest; None where the user wants no cache."""
    cache = RangeCache.of_user()
    return cache.folder / f"{text_digest(repr(file))}.digest" if cache.max_bytes else None


def text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


def read_cached(place: Path, file: tuple[str, int, int, int, int]) -> str | None:
    """A digest that this user cached; None for anything else."""
    try:
        handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(handle, "rb", buffering=0) as opened:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
            return None
        line = opened.read(256) or b""
    found = line[: 2 * DIGEST_BYTES].decode("ascii", "replace")
    return found if line == as_line(file, found) else None


def write_cached(place: Path, file: tuple[str, int, int, int, int], digest: str) -> None:
    """Caches a digest if the disk allows it; without it, the file is read again next time."""
    temporary = place.with_name(f"{place.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    with contextlib.suppress(OSError):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(handle, "wb", buffering=0) as opened:
                opened.write(as_line(file, digest))
            temporary.rename(place)
        finally:
            temporary.unlink(missing_ok=True)


def as_line(file: tuple[str, int, int, int, int], digest: str) -> bytes:
    return f"{digest} {text_digest(f'{digest} {file!r}')}\n".encode("utf-8", "surrogateescape")
