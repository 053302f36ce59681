"""A bounded folder of byte ranges that were fetched before, for reading the same store again without its server.

Several threads and processes may share the folder. Its content is not trusted: a file of another length counts as
absent, the caller checks the bytes, and a full disk only means fetching again. Puts are serialised by a file lock,
which keeps the folder below its size limit.
"""

import contextlib
import fcntl
import hashlib
import os
import re
from pathlib import Path
from typing import Final

from shared.errors import UserError
from shared.files.handles import SCRATCH, Buffer
from shared.progress import say

DEFAULT_GB: Final = 10.0
KEPT: Final = 0.9
"""When the folder is full, the least recently used files are deleted until this fraction of the limit is left."""
TOTAL_FILE: Final = "sagsae.total"
TEMPORARY: Final = "sagsae.tmp"
RANGE_FILE: Final = re.compile(r"[0-9a-f]{40}\.range")

Key = tuple[str | int, ...]


class RangeCache:
    """At most `max_bytes` of ranges in a folder; the least recently used are deleted first. 0 keeps nothing."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.warned = False

    @classmethod
    def of_user(cls) -> "RangeCache":
        """The user's cache: in SAGSAE_CACHE (else XDG_CACHE_HOME/sagsae, else ~/.cache/sagsae), of SAGSAE_CACHE_GB
        gigabytes."""
        text = os.environ.get("SAGSAE_CACHE_GB", str(DEFAULT_GB))
        try:
            max_bytes = int(float(text) * 1e9)
        except (ValueError, OverflowError):
            max_bytes = -1
        if max_bytes < 0:
            raise UserError(f"SAGSAE_CACHE_GB={text}: expected a number of gigabytes, 0 for no cache")
        if folder := os.environ.get("SAGSAE_CACHE"):
            return cls(Path(os.path.expanduser(folder)), max_bytes)
        base = os.environ.get("XDG_CACHE_HOME", "")
        return cls((Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sagsae", max_bytes)

    def get(self, key: Key, length: int) -> Buffer | None:
        """Returns the range, valid until the same thread reads again; None when it must be fetched."""
        if not self.max_bytes:
            return None
        try:
            with self.path(key).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != length:
                    return None
                buffer = SCRATCH.take(length)
                if file.readinto(buffer) != length:
                    return None
                with contextlib.suppress(OSError):
                    os.utime(file.fileno())  # marks the file as recently used
                return buffer
        except OSError:
            return None

    def put(self, key: Key, data: Buffer) -> None:
        """Keeps a range if the disk allows it."""
        if len(data) > self.max_bytes:
            return
        temporary = self.folder / TEMPORARY
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self.folder / TOTAL_FILE).open("a+b", buffering=0) as total:
                fcntl.flock(total, fcntl.LOCK_EX)
                self.reserve(total.fileno(), len(data))
                try:
                    with temporary.open("wb") as file:
                        file.write(data)
                    temporary.rename(self.path(key))
                except OSError:
                    temporary.unlink(missing_ok=True)
                    raise
        except OSError as error:
            if not self.warned:
                self.warned = True
                say(f"{self.folder}: cannot cache fetched data ({error.strerror}). SAGSAE_CACHE names another folder")

    def forget(self, key: Key) -> None:
        """Drops a range, so that it is fetched again."""
        with contextlib.suppress(OSError):
            self.path(key).unlink(missing_ok=True)

    def path(self, key: Key) -> Path:
        return self.folder / f"{hashlib.blake2b(repr(key).encode(), digest_size=20).hexdigest()}.range"

    def reserve(self, total: int, length: int) -> None:
        """Adds `length` bytes to the count before they are written: a crash leaves the count too high, never too low. A
        missing count, or one above the limit, is corrected by scanning the folder."""
        text = os.pread(total, 32, 0)
        size = int(text) if text.isdigit() else self.max_bytes
        if size + length > self.max_bytes:
            size = self.evict(min(int(self.max_bytes * KEPT), self.max_bytes - length))
        os.ftruncate(total, 0)
        os.write(total, b"%d" % (size + length))

    def evict(self, limit: int) -> int:
        """Deletes the least recently used files until at most `limit` bytes are left; returns how many are left."""
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                if RANGE_FILE.fullmatch(entry.name):  # other files are not the cache's
                    found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        size = sum(length for _, length, _ in found)
        for _, length, path in sorted(found):
            if size <= limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            size -= length
        return size
