"""Where text comes from: a file, a folder of files or a Hugging Face data set, as a stream of documents.

Files are read with the standard library and pyarrow: only the name of a data set opens a connection. Every pass over
`Corpus.documents` gives the same texts in the same order. Opening a local corpus reads its files once, to hash them.
"""

import codecs
import functools
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from shared.config import HarvestConfig
from shared.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Where documents come from."""

    description: dict[str, Any]
    """JSON-able identity: equal descriptions promise equal texts. Holds no absolute path."""
    documents: Callable[[], Iterator[str]]
    """A fresh pass over the documents' text, in source order. Raises UserError at a document that cannot be read."""


def open_corpus(config: HarvestConfig, default: Path | None) -> Corpus:
    """The corpus that `config.corpus` names, or else the file `default` (a `corpus.jsonl` beside a local model).

    A file or folder that exists here wins over a data set of the same name. Raises UserError when there is nothing
    to read; a local corpus is read once, to hash it.
    """
    if config.corpus is None:
        if default is None or not default.is_file():
            raise UserError("this model comes with no corpus: pass --corpus FILE, FOLDER or the name of a data set")
        return _local(default, config.text_field)
    if not config.corpus.strip():
        raise UserError("--corpus is empty: give a file, a folder or the name of a Hugging Face data set")
    path = Path(os.path.expanduser(config.corpus))  # unlike Path.expanduser, leaves an unknown ~user alone
    with _reading(path):
        exists = path.exists()
    if exists:
        return _local(path, config.text_field)
    if _means_a_path(config.corpus):
        raise UserError(
            f"corpus {config.corpus}: there is no such file or folder. Check the path; "
            "a Hugging Face data set is named NAME or OWNER/NAME"
        )
    return _hub(config.corpus, config)


def _means_a_path(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path. A version (`owner/corpus-v1.5`) is no extension."""
    extension = "/" in name and Path(name).suffix[1:].isalpha()
    shape = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return shape or extension or bool(_extension(Path(name)))


def _local(path: Path, field: str) -> Corpus:
    """One file, or the files of known extension below a folder, by relative path. Links to folders are not followed."""
    if path.is_dir():
        root, files = path, _files_below(path)
        if not files:
            raise UserError(f"corpus {path}: this folder holds no file that can be read ({', '.join(READERS)})")
    elif not path.is_file():
        raise UserError(f"corpus {path}: is neither a regular file nor a folder; save the text to a file first")
    elif not _extension(path):
        raise UserError(f"corpus {path}: its extension is not known; known are {', '.join(READERS)}")
    else:
        root, files = path.parent, [path]
    described = [_described(file, root) for file in files]
    description = {"kind": "files", "files": described, "text_field": field}
    return Corpus(description, lambda: chain.from_iterable(READERS[_extension(file)](file, field) for file in files))


def _files_below(root: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    with _reading(root):  # os.walk and not rglob, which skips folders that it may not list
        found = [Path(folder, name) for folder, _, names in os.walk(root, onerror=fail) for name in names]
    return sorted(filter(_extension, found), key=lambda file: file.relative_to(root).as_posix())


def _described(file: Path, root: Path) -> dict[str, Any]:
    with _reading(file), file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return {"name": file.relative_to(root).as_posix(), "bytes": stream.tell(), "blake2b": digest}


def _whole_file(path: Path, _field: str) -> Iterator[str]:
    with _reading(path):
        data = path.read_bytes()
    yield _decoded(data.removeprefix(codecs.BOM_UTF8), path, 1)


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with _reading(path), gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
        for number, data in enumerate(lines, 1):
            line = _decoded(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data, path, number)
            if line.isspace() or not line:
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: is not JSON ({error}); one object a line is expected") from error
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise UserError(f'{path}:{number}: is a {kind}; one object a line, {{"{field}": ...}}, is expected')
            yield _text(record, field, f"{path}:{number}")


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with _reading(path), path.open("rb") as source:
            file = pa.parquet.ParquetFile(source)
            if field not in file.schema_arrow.names:
                raise _missing(field, file.schema_arrow.names, str(path))
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _text({field: value}, field, f"{path}, row {row}")
    except pa.ArrowException as error:
        raise UserError(f"{path}: is not a readable parquet file ({_cause(error)}); write it anew") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {row}: {field!r} is not UTF-8 ({error.reason}); write it anew") from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_lines,
    ".txt": _whole_file,
    ".md": _whole_file,
    ".parquet": _parquet,
}
"""How to read a file of each known extension: (path, text field) -> its documents."""


def _extension(path: Path) -> str:
    """The known extension that a file's name ends in; empty when there is none."""
    return next((known for known in READERS if path.name.lower().endswith(known)), "")


def _hub(name: str, config: HarvestConfig) -> Corpus:
    """A Hugging Face data set, streamed. Opens connections, here and while reading."""
    import datasets

    datasets.disable_progress_bars()
    field = config.text_field
    try:
        dataset = datasets.load_dataset(name, config.corpus_config, split=config.corpus_split, streaming=True)
    except Exception as error:  # builder, hub, HTTP and file system errors share no other base
        raise _unreadable(name, error) from error
    if dataset.column_names is not None and field not in dataset.column_names:
        raise _missing(field, dataset.column_names, f"corpus {name}")
    description = {
        "kind": "huggingface",
        "name": name,
        "config": config.corpus_config,
        "split": config.corpus_split,
        "commit": _commit(dataset),
        "text_field": field,
    }
    return Corpus(description, functools.partial(_hub_documents, dataset, name, field))


def _commit(dataset: Any) -> str | None:
    """The commit in the names of the streamed files (hf://datasets/OWNER/NAME@COMMIT/...): nothing public has it."""
    names = repr(getattr(getattr(dataset, "_ex_iterable", None), "kwargs", None))
    found = re.search(r"hf://datasets/[^@'\"]+@([0-9a-f]{40})/", names)
    return found and found[1]


def _hub_documents(dataset: Iterable[dict[str, Any]], name: str, field: str) -> Iterator[str]:
    try:
        for number, example in enumerate(dataset, 1):
            yield _text(example, field, f"corpus {name}, example {number}")
    except UserError:
        raise
    except Exception as error:  # as in _hub: the connection may also fail half-way
        raise _unreadable(name, error) from error


def _text(record: dict[str, Any], field: str, where: str) -> str:
    """The text of one record. Raises UserError when there is none, or none that can be written as UTF-8."""
    if field not in record:
        raise _missing(field, list(record), where)
    text = record[field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"{where}: {field!r} is of type {kind}, not a string. Choose another: --set text_field=NAME")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, tokenizers cannot take it
        raise UserError(f"{where}: {field!r} is not Unicode text ({error.reason}); correct or remove it") from error
    return text


def _decoded(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise UserError(f"{path}:{line}: is not UTF-8 ({error.reason}); convert the file to UTF-8") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the file system and gzip raise into a UserError about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"corpus {path}: cannot be read ({error.strerror or error})") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"corpus {path}: is damaged or cut short ({error}); fetch or write it anew") from error


def _missing(field: str, there: list[str], where: str) -> UserError:
    fields = ", ".join(map(str, there)) or "none"
    return UserError(f"{where}: has no field {field!r}; there are: {fields}. Choose one: --set text_field=NAME")


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(
        f"corpus {name}: no file or folder here, and not readable as a Hugging Face data set ({_cause(error)}). "
        "Check the name, corpus_config, corpus_split and the network, or give a local file or folder"
    )


def _cause(error: Exception) -> str:
    """The first line of what a library said, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
