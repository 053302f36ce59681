"""What exists in a store, and how it comes to exist: commits, and files that are whole or absent.

A shard is committed by one line in its writer's manifest file, appended and synced after all its files are in place.
The line carries the length and crc32c of every file and ends in its own crc32c, so a torn line is recognised.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import DamagedError, UserError
from shared.shard import crc32c

MANIFEST_VERSION: Final = 1
LOCK_FILE: Final = ".lock"


@dataclass(frozen=True)
class Commit:
    """One manifest line: a shard that exists, and the length and crc32c of each of its files."""

    shard: int
    rows: int
    start: int
    stop: int
    kept: int
    """Rows that count in the statistics: not position 0, not a special token."""
    files: dict[str, tuple[int, int]]

    def line(self) -> str:
        body = {
            "v": MANIFEST_VERSION,
            "k": self.shard,
            "rows": self.rows,
            "in": [self.start, self.stop],
            "kept": self.kept,
            "files": {path: {"bytes": n, "crc32c": crc} for path, (n, crc) in sorted(self.files.items())},
        }
        text = json.dumps(body, separators=(",", ":"))
        return f'{text[:-1]},"c":{crc32c(text.encode())}}}\n'


def parse_commit(line: str) -> Commit | None:
    """The commit of a manifest line, or None when the line is torn or altered."""
    text, found, crc = line.rstrip("\n").rpartition(',"c":')
    if not found or not line.endswith("}\n") or crc != f"{crc32c((text + '}').encode())}}}":
        return None
    body = json.loads(text + "}")
    files = {path: (entry["bytes"], entry["crc32c"]) for path, entry in body["files"].items()}
    return Commit(body["k"], body["rows"], body["in"][0], body["in"][1], body["kept"], files)


def read_manifest(root: Path) -> dict[int, Commit]:
    """Every committed shard. A torn last line (a crash while it was written) is not a commit; a bad line before
    the last is damage, and raises DamagedError."""
    commits: dict[int, Commit] = {}
    for path in sorted((root / "manifest").glob("rank-*.jsonl")):
        lines = path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            commit = parse_commit(line.decode(errors="replace"))
            if commit is not None:
                commits[commit.shard] = commit
            elif number < len(lines):
                raise DamagedError(f"{path}: line {number} of the manifest is damaged; restore it from a copy")
    return dict(sorted(commits.items()))


def manifest_file(root: Path, writer: int) -> Path:
    return root / "manifest" / f"rank-{writer:05d}.jsonl"


def append_commit(root: Path, writer: int, commit: Commit) -> None:
    """Commits a shard: after this returns the shard exists, whatever happens next."""
    path = manifest_file(root, writer)
    with path.open("ab") as file:
        file.write(commit.line().encode())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def clean_up(root: Path) -> None:
    """After a crash: cuts the line that was being written, deletes files that were not yet renamed."""
    for path in (root / "manifest").glob("rank-*.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and parse_commit(lines[-1].decode(errors="replace")) is None:
            os.truncate(path, sum(map(len, lines[:-1])))
    for leftover in root.rglob("*.tmp"):
        leftover.unlink()


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """All of `data` under `path`, or nothing: tmp, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def writer_lock(root: Path) -> Iterator[None]:
    """One writer of a folder at a time. The lock dies with its process. Raises UserError naming the holder."""
    with (root / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{root}: {holder} is writing here; wait for it, or stop it first") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def explained(root: Path) -> Iterator[None]:
    """Turns a full disk or a read-only one into a message; what is committed stays valid."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full. Free space",
            errno.EDQUOT: "the disk quota is used up. Free space",
            errno.EROFS: "the file system is read-only. Make it writable",
            errno.EACCES: "permission denied. Make the folder writable",
        }
        if error.errno not in reasons:
            raise
        raise UserError(
            f"{root}: {reasons[error.errno]}, then run the same command again: what is committed is safe and stays"
        ) from error


def read_range(file: Path, offset: int, length: int | None, expected: int) -> bytes:
    """Bytes of a committed file, whose length must be what the manifest says. Raises DamagedError otherwise."""
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError as error:
        raise DamagedError(f"{file}: is committed but missing. List all damage with: sagsae store verify") from error
    try:
        size = os.fstat(handle).st_size
        if size != expected:
            raise DamagedError(
                f"{file}: has {size} bytes, {expected} were committed. List all damage with: sagsae store verify"
            )
        return os.pread(handle, expected - offset if length is None else length, offset)
    finally:
        os.close(handle)
