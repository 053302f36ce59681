"""Reads the bytes of a corpus file: opened only where it is a regular file, unpacked, read in bounded parts.

However much a packed file unpacks to, at most RECORD_BYTES of it are held at a time.
"""

import codecs
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from harvest.corpus.documents import BadDocument, OnBad, StopCheck, cause
from shared.errors import UserError
from shared.files.local import error_kind

BLOCK_BYTES: Final = 1 << 20
RECORD_BYTES: Final = 1 << 28
"""The longest line, JSON value, CSV row or parquet value that is read."""
TOO_LONG: Final = f"is longer than {RECORD_BYTES >> 20} MiB; split it, or save its text as a .txt file"


@runtime_checkable
class BoundedBytes(Protocol):
    """The read methods that a file and an unpacker share."""

    def read(self, size: int = -1, /) -> bytes: ...

    def readline(self, size: int = -1, /) -> bytes: ...


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the errors of the file system, gzip and zstd into a UserError about `path`."""
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise _damaged(path, error) from error
    except MemoryError as error:
        raise UserError(f"corpus {path}: what is read from it does not fit into memory; split it") from error
    except OSError as error:
        if error.errno is None and path.suffix.lower() in (".zst", ".parquet"):  # pyarrow raises a bare OSError
            raise _damaged(path, error) from error
        raise error_kind(error)(f"corpus {path}: cannot be read ({error.strerror or error})") from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"corpus {path}: is damaged or cut short ({cause(error)}); fetch or write it again")


def open_regular(path: Path) -> io.BufferedReader:
    """Opens the bytes of a file. Raises UserError for a pipe, a socket or a device, which may have no end; never waits
    for one."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        check_regular(path)  # a socket cannot be opened at all
        raise
    stream = open(handle, "rb")  # noqa: SIM115 (the caller closes it)
    try:
        _check_mode(path, os.fstat(handle).st_mode)
    except UserError:
        stream.close()
        raise
    return stream


def check_regular(path: Path) -> None:
    """Raises UserError for anything but a regular file or a link to one, OSError where nothing exists."""
    _check_mode(path, os.stat(path).st_mode)


def _check_mode(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UserError(
            f"corpus {path}: is neither a regular file nor a folder; save the text to a file first, or move it away"
        )


@contextmanager
def unpacked(path: Path) -> Iterator[BoundedBytes]:
    """Yields a file's bytes, unpacked where its name says that they are packed."""
    with reading(path), open_regular(path) as stream:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            with gzip.open(stream) as content:
                yield content
        elif suffix == ".zst":
            import pyarrow as pa

            with pa.CompressedInputStream(stream, "zstd") as packed, io.BufferedReader(packed) as content:
                yield content
        else:
            yield stream


def lines(stream: BoundedBytes, path: Path, on_bad: OnBad, check_stop: StopCheck) -> Iterator[tuple[int, bytes]]:
    """Yields lines with their numbers from 1, without a byte order mark. `on_bad` receives each line that is too
    long."""
    number = 0
    while line := stream.readline(RECORD_BYTES + 1):
        number += 1
        check_stop()
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) <= RECORD_BYTES:
            yield number, line
            continue
        on_bad(BadDocument(f"{path}:{number}: {TOO_LONG}"))
        while line and not line.endswith(b"\n"):
            check_stop()
            line = stream.readline(BLOCK_BYTES)


def decoded(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise BadDocument(f"{path}:{line}: is not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def text_blocks(path: Path, check_stop: StopCheck) -> Iterator[str]:
    """The text of a file, about BLOCK_BYTES at a time. Raises BadDocument where it is not UTF-8."""
    with unpacked(path) as stream:
        rest, line = b"", 1
        block = stream.read(BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
        while block or rest:
            check_stop()
            following = stream.read(BLOCK_BYTES)
            data = rest + block
            whole = len(data) if not following else _whole_characters(data)
            yield decoded(data[:whole], path, line)
            line += data.count(b"\n", 0, whole)
            rest, block = data[whole:], following


def _whole_characters(data: bytes) -> int:
    """The number of bytes before a character that may continue after the end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character
            return len(data) - back if byte >= 0xC0 else len(data)
    return len(data)
