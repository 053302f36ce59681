"""Reads documents from files: plain text, JSON, CSV and parquet, packed or not, with the standard library and pyarrow.

There is one reader per known extension. A reader passes a document that cannot be used to `on_bad` and continues after
it. A file that cannot be read, or is cut short, ends the pass with a UserError.
"""

import codecs
import csv
import functools
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final

from harvest.corpus.documents import (
    BadDocument,
    Corpus,
    Document,
    DocumentField,
    LongText,
    OnBad,
    StopCheck,
    cause,
    missing_field,
    never_stop,
    refuse,
)
from harvest.corpus.folder import file_identities, files_below
from harvest.corpus.json_values import MAX_MEMBERS, JsonCursor, check_members, members
from harvest.corpus.raw_bytes import (
    BLOCK_BYTES,
    RECORD_BYTES,
    decoded,
    lines,
    open_regular,
    reading,
    text_blocks,
    unpacked,
)
from shared.errors import UserError
from shared.progress import say

Reader = Callable[[Path, DocumentField, OnBad, StopCheck], Iterator[Document]]
WHOLE: Final = 4 * BLOCK_BYTES
"""Characters up to which a text file is read at once. A longer one is read while it is tokenised."""
MUCH: Final = 4 << 30
"""Bytes of files above which a message announces the hashing, because it takes some seconds."""
ROWS: Final = 64
"""Rows of a parquet file read at a time; fewer where they are large."""
PAGE_HEADER: Final = re.compile(rb"\x15([\x80-\xff]{0,4}[\x00-\x7f])\x15([\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)
DICTIONARY_PAGE: Final = 2


def files_corpus(path: Path, field: DocumentField, check_stop: StopCheck = never_stop) -> Corpus:
    """A corpus of one file, or of the files of known extension below a folder, sorted by relative path.

    Every file is read once, to hash it. Raises UserError when there is nothing to read.
    """
    if path.is_dir():
        found = files_below(path, extension)
        if not found.files:
            raise UserError(f"corpus {path}: this folder holds no file that can be read ({KNOWN}): {found}")
        root, files = path, found.files
        say(f"corpus {path}: {found}")
    elif not path.is_file():
        raise UserError(f"corpus {path}: is neither a regular file nor a folder; save the text to a file first")
    elif not extension(path):
        raise UserError(f"corpus {path}: its extension is not known; known are {KNOWN}")
    else:
        root, files = path.parent, [path]
    size = sum(file.stat().st_size for file in files if file.exists())  # a missing file raises when it is read
    if size > MUCH:
        say(f"corpus {path}: {size / 1e9:,.1f} GB are read once, to identify this corpus by its hash")
    description = {"kind": "files", "files": file_identities(files, root, check_stop), "text_field": field.name}

    def read(on_bad: OnBad, check_stop: StopCheck) -> Iterator[Document]:
        return chain.from_iterable(READERS[extension(file)](file, field, on_bad, check_stop) for file in files)

    return Corpus(description, read)


def _whole_file(path: Path, _field: DocumentField, on_bad: OnBad, check_stop: StopCheck) -> Iterator[Document]:
    parts: list[str] = []
    size, blank = 0, True
    try:
        for block in text_blocks(path, check_stop):
            size += len(block)
            blank = blank and block.isspace()
            parts = [*parts, block] if size <= WHOLE else []
    except BadDocument as error:
        return on_bad(error)
    if size <= WHOLE:
        yield "".join(parts)
    else:
        yield "" if blank else LongText(functools.partial(text_blocks, path, check_stop))
    return None


def _json_lines(path: Path, field: DocumentField, on_bad: OnBad, check_stop: StopCheck) -> Iterator[Document]:
    with unpacked(path) as stream:
        for number, data in lines(stream, path, on_bad, check_stop):
            try:
                line = decoded(data, path, number)
                if line.isspace() or not line:
                    continue
                document = _document_of_line(line, field, f"{path}:{number}")
            except BadDocument as error:
                on_bad(error)
            else:
                yield document


def _document_of_line(line: str, field: DocumentField, where: str) -> Document:
    try:
        check_members(line)
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"{where}: is not JSON ({error}); one object per line is expected") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise BadDocument(f'{where}: is a {kind}; one object per line, {{"{field.name}": ...}}, is expected')
    return field.document(record, where)


def _json(path: Path, field: DocumentField, on_bad: OnBad, check_stop: StopCheck) -> Iterator[Document]:
    """Reads an array; or one object per line; or objects that span lines."""
    values = JsonCursor(text_blocks(path, check_stop), str(path))
    if _first_byte(path) == b"[":
        found: Iterator[tuple[str, Any]] = _array(values)
    elif _spans_lines(path, check_stop):
        found = _sequence(values)
    else:
        yield from _json_lines(path, field, on_bad, check_stop)
        return
    for where, value in found:
        try:
            document = _document_of_member(value, field, where)
        except BadDocument as error:
            on_bad(error)
        else:
            yield document


def _first_byte(path: Path) -> bytes:
    """The first byte that is neither white space nor part of a byte order mark."""
    with unpacked(path) as stream:
        block = stream.read(BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
        while block and not block.strip():
            block = stream.read(BLOCK_BYTES)
        return block.lstrip()[:1]


def _spans_lines(path: Path, check_stop: StopCheck) -> bool:
    """Whether the first value spans more than one line. Text that is no JSON at all is left to the reader of lines."""
    with unpacked(path) as stream:
        first = next((line for _, line in lines(stream, path, lambda _: None, check_stop) if line.strip()), b"")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        pass
    else:
        return False
    try:
        JsonCursor(text_blocks(path, check_stop), str(path)).value()
    except UserError:
        return False
    return True


def _array(values: JsonCursor) -> Iterator[tuple[str, Any]]:
    yield from members(values)
    if values.peek():
        raise UserError(
            f"{values.where}: has more text after the array; one array, or one object per line, is expected"
        )


def _sequence(values: JsonCursor) -> Iterator[tuple[str, Any]]:
    while values.peek():
        where = values.where
        yield where, values.value()


def _document_of_member(value: Any, field: DocumentField, where: str) -> Document:
    if isinstance(value, str | list):
        return field.document({field.name: value}, where)
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise BadDocument(f"{where}: is a {kind}; an object, a text or a list of ids is expected")
    return field.document(value, where)


def _table(
    delimiter: str, path: Path, field: DocumentField, on_bad: OnBad, check_stop: StopCheck
) -> Iterator[Document]:
    """Reads a table with the names of its columns in the first row. A quoted field may span several lines."""
    csv.field_size_limit(RECORD_BYTES)
    with unpacked(path) as stream:
        rows = csv.reader(_table_lines(stream, delimiter, path, check_stop), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            where = f"{path}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise UserError(f"{where}: is not a table that can be read ({error}); write it again") from error
            if row is None:
                return
            if not header:
                header = _checked_header(row, field, where) if row else []
            elif row:
                try:
                    document = field.document(_checked_row(row, header, where), where)
                except BadDocument as error:
                    on_bad(error)
                else:
                    yield document


def _table_lines(stream: Any, delimiter: str, path: Path, check_stop: StopCheck) -> Iterator[str]:
    for number, data in lines(stream, path, refuse, check_stop):
        if len(data) > MAX_MEMBERS and data.count(delimiter.encode()) > MAX_MEMBERS:
            raise UserError(f"{path}:{number}: has more than {MAX_MEMBERS >> 20} million columns")
        yield data.decode(errors="surrogateescape")  # a bad byte is reported later, if it is in the document


def _checked_header(row: list[str], field: DocumentField, where: str) -> list[str]:
    if row.count(field.name) != 1:
        if field.name in row:
            raise UserError(f"{where}: {twice(field.name)}")
        raise UserError(missing_field(field.name, row, where))
    return row


def twice(column: str) -> str:
    return f"has more than one column {column!r}; rename all but one"


def _checked_row(row: list[str], header: list[str], where: str) -> dict[str, str]:
    if len(row) != len(header):
        raise BadDocument(
            f"{where}: has {len(row)} columns, the first row {len(header)}. Put quotation marks around what has a "
            "separator in it"
        )
    return dict(zip(header, row, strict=True))


def _parquet(path: Path, field: DocumentField, on_bad: OnBad, check_stop: StopCheck) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with reading(path), open_regular(path) as source:
            file = pa.parquet.ParquetFile(source, buffer_size=BLOCK_BYTES)
            if not field.is_among(file.schema_arrow.names):
                raise UserError(missing_field(field.name, file.schema_arrow.names, str(path)))
            if file.schema_arrow.names.count(field.name) > 1:
                raise UserError(f"{path}: {twice(field.name)}")
            row = 0
            for batch in file.iter_batches(batch_size=_rows_at_a_time(file, source, field), columns=[field.name]):
                check_stop()
                if not batch.num_columns:
                    raise UserError(missing_field(field.name, file.schema_arrow.names, str(path)))
                for value in batch.column(0):
                    row += 1
                    try:
                        document = _document_of_value(value, batch.schema.names[0], field, f"{path}, row {row}")
                    except BadDocument as error:
                        on_bad(error)
                    else:
                        yield document
    except pa.ArrowException as error:
        raise UserError(f"{path}: is not a readable parquet file ({cause(error)}); write it again") from error


def _rows_at_a_time(file: Any, source: BinaryIO, field: DocumentField) -> int:
    """So many that they take about four blocks, by what the file says of itself; and no more than RECORD_BYTES if each
    of them were all of the dictionary that a file of a kilobyte may have."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    ours = (column for column in columns if column.path_in_schema.split(".")[0] == field.name.split(".")[0])
    dictionary = max((_dictionary_bytes(column, source) for column in ours), default=0)
    return max(1, min(ROWS, 4 * BLOCK_BYTES // max(1, largest), RECORD_BYTES // max(1, dictionary)))


def _dictionary_bytes(column: Any, source: BinaryIO) -> int:
    """How long the distinct values of a column are together, by the header of its first page, in Thrift's compact
    protocol: the page's type, then its size, each as a field of its own. RECORD_BYTES where it is not so."""
    offsets = (column.dictionary_page_offset, column.data_page_offset)
    source.seek(min((offset for offset in offsets if offset and offset > 0), default=0))
    found = PAGE_HEADER.match(source.read(16))
    if not found:
        return RECORD_BYTES
    kind, size = (_unsigned(number) >> 1 for number in found.groups())
    return size if kind == DICTIONARY_PAGE else 0


def _unsigned(number: bytes) -> int:
    return sum((byte & 0x7F) << 7 * place for place, byte in enumerate(number))


def _document_of_value(value: Any, column: str, field: DocumentField, where: str) -> Document:
    try:
        plain = value.as_py()
    except UnicodeDecodeError as error:
        raise BadDocument(f"{where}: {field.name!r} is not UTF-8 ({error.reason}); write it again") from error
    except (ArithmeticError, ValueError, LookupError) as error:  # a date in the year 147,000, an unknown time zone
        raise BadDocument(f"{where}: {field.name!r} is a {value.type} that cannot be read ({cause(error)})") from error
    return field.document({column: plain}, where)


PLAIN: Final[dict[str, Reader]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": functools.partial(_table, ","),
    ".tsv": functools.partial(_table, "\t"),
    ".txt": _whole_file,
    ".md": _whole_file,
}
READERS: Final[dict[str, Reader]] = {
    **{kind + packed: reader for kind, reader in PLAIN.items() for packed in ("", ".gz", ".zst")},
    ".parquet": _parquet,
}
"""The reader of each known extension."""
KNOWN: Final = f"{', '.join(PLAIN)}, each also with .gz or .zst behind it; .parquet; .npy for one file"


def extension(path: Path) -> str:
    """The known extension that a file's name ends in; empty when there is none."""
    return next((known for known in READERS if path.name.lower().endswith(known)), "")
