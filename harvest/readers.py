"""Files to documents: plain text, JSON lines and parquet, compressed or not, with the standard library and pyarrow.

One reader for each known extension. A reader tells `on_bad` of a document that cannot be used and goes on after it;
a file that cannot be read, or is cut short, ends the pass with a UserError.
"""

import codecs
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

from harvest.documents import BadDocument, Corpus, Document, Field, OnBad, cause, missing
from shared.errors import UserError

Reader = Callable[[Path, Field, OnBad], Iterator[Document]]


def files_corpus(path: Path, field: Field) -> Corpus:
    """One file, or the files of known extension below a folder, by relative path. Links to folders are not followed.

    Every file is read once, to hash it. Raises UserError when there is nothing to read.
    """
    if path.is_dir():
        root, files = path, _files_below(path)
        if not files:
            raise UserError(f"corpus {path}: this folder holds no file that can be read ({', '.join(READERS)})")
    elif not path.is_file():
        raise UserError(f"corpus {path}: is neither a regular file nor a folder; save the text to a file first")
    elif not extension(path):
        raise UserError(f"corpus {path}: its extension is not known; known are {', '.join(READERS)}, .npy")
    else:
        root, files = path.parent, [path]
    description = {"kind": "files", "files": described(files, root), "text_field": field.name}
    return Corpus(
        description,
        lambda on_bad: chain.from_iterable(READERS[extension(file)](file, field, on_bad) for file in files),
    )


def _files_below(root: Path) -> list[Path]:
    return sorted(filter(extension, all_below(root)), key=lambda file: file.relative_to(root).as_posix())


def all_below(root: Path) -> list[Path]:
    """Every file below a folder, in no order."""

    def fail(error: OSError) -> None:
        raise error

    with reading(root):  # os.walk and not rglob, which skips folders that it may not list
        return [Path(folder, name) for folder, _, names in os.walk(root, onerror=fail) for name in names]


def described(files: list[Path], root: Path) -> list[dict[str, Any]]:
    """The identity of files: name relative to `root`, size and hash."""
    return [_described(file, root) for file in files]


def _described(file: Path, root: Path) -> dict[str, Any]:
    with reading(file), file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return {"name": file.relative_to(root).as_posix(), "bytes": stream.tell(), "blake2b": digest}


def _whole_file(path: Path, _field: Field, on_bad: OnBad) -> Iterator[Document]:
    with _opened(path) as stream:
        data = stream.read()
    try:
        text = _decoded(data.removeprefix(codecs.BOM_UTF8), path, 1)
    except BadDocument as error:
        on_bad(error)
    else:
        yield text


def _json_lines(path: Path, field: Field, on_bad: OnBad) -> Iterator[Document]:
    with _opened(path) as lines:
        for number, data in enumerate(lines, 1):
            try:
                line = _decoded(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data, path, number)
                if line.isspace() or not line:
                    continue
                document = _of_line(line, field, f"{path}:{number}")
            except BadDocument as error:
                on_bad(error)
            else:
                yield document


def _of_line(line: str, field: Field, where: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"{where}: is not JSON ({error}); one object a line is expected") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise BadDocument(f'{where}: is a {kind}; one object a line, {{"{field.name}": ...}}, is expected')
    return field.document(record, where)


def _parquet(path: Path, field: Field, on_bad: OnBad) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with reading(path), path.open("rb") as source:
            file = pa.parquet.ParquetFile(source)
            if field.name not in file.schema_arrow.names:
                raise UserError(missing(field.name, file.schema_arrow.names, str(path)))
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field.name]):
                for value in batch.column(0):
                    row += 1
                    try:
                        document = _of_value(value, field, f"{path}, row {row}")
                    except BadDocument as error:
                        on_bad(error)
                    else:
                        yield document
    except pa.ArrowException as error:
        raise UserError(f"{path}: is not a readable parquet file ({cause(error)}); write it anew") from error


def _of_value(value: Any, field: Field, where: str) -> Document:
    try:
        plain = value.as_py()
    except UnicodeDecodeError as error:
        raise BadDocument(f"{where}: {field.name!r} is not UTF-8 ({error.reason}); write it anew") from error
    return field.document({field.name: plain}, where)


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".jsonl.zst": _json_lines,
    ".json": _json_lines,
    ".txt": _whole_file,
    ".txt.gz": _whole_file,
    ".txt.zst": _whole_file,
    ".md": _whole_file,
    ".parquet": _parquet,
}
"""How to read a file of each known extension."""


def extension(path: Path) -> str:
    """The known extension that a file's name ends in; empty when there is none."""
    return next((known for known in READERS if path.name.lower().endswith(known)), "")


def _decoded(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise BadDocument(f"{path}:{line}: is not UTF-8 ({error.reason}); convert the file to UTF-8") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where its name says that they are packed."""
    with reading(path), path.open("rb") as stream:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            with gzip.open(stream) as unpacked:
                yield unpacked  # type: ignore[misc]  # gzip's own class, which is read like any other
        elif suffix == ".zst":
            import pyarrow as pa

            with pa.CompressedInputStream(stream, "zstd") as packed, io.BufferedReader(packed) as unpacked:
                yield unpacked
        else:
            yield stream


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the file system, gzip and zstd raise into a UserError about `path`."""
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None and path.suffix.lower() == ".zst":  # pyarrow's, which has no type for it
            raise _damaged(path, error) from error
        raise UserError(f"corpus {path}: cannot be read ({error.strerror or error})") from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"corpus {path}: is damaged or cut short ({error}); fetch or write it anew")
