"""Finds the files of a folder that are a corpus, and computes what identifies files.

Left out, and counted: names that begin with a dot, cards and licences, files of unknown format, and folders that were
already read under another name. Links to folders are followed.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harvest.corpus.documents import StopCheck, never_stop
from harvest.corpus.raw_bytes import check_regular, open_regular, reading

CARD: Final = re.compile(
    r"(readme|licen[cs]e|copying|copyright|notice|changelog|contributing|code_of_conduct|citation|authors)([^a-z].*)?"
)
"""Lower-case names of files that describe a corpus and are no part of it."""
SHEETS: Final = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Description files that the `datasets` library writes."""
TEXTS: Final = (".txt", ".md", ".txt.gz", ".txt.zst", ".md.gz", ".md.zst")
"""Extensions that a card can have. `notice.jsonl` is data."""
HASHED_BYTES: Final = 1 << 20
HIDDEN, ABOUT, OTHER = "hidden", "cards or licences", "of other formats"
AGAIN: Final = "folders that are read already by another name"


@dataclass
class FolderListing:
    """The files below a folder."""

    files: list[Path] = field(default_factory=list)
    """Files to read, sorted by relative path."""
    left: Counter[str] = field(default_factory=Counter)
    """How many files were left out, by the reason."""
    formats: set[str] = field(default_factory=set)
    """Last extensions of the files of unknown format."""

    def __str__(self) -> str:
        """`read 3 files, left out 2 (1 hidden, 1 of other formats: .png)`."""
        read = f"read {len(self.files):,} file{'s' * (len(self.files) != 1)}"
        if not self.left.total():
            return read
        named = {OTHER: ": " + ", ".join(sorted(self.formats)[:8])}
        left = [f"{count:,} {reason}{named.get(reason, '')}" for reason, count in self.left.items() if count]
        return f"{read}, left out {self.left.total():,} ({'; '.join(left)})"


def files_below(root: Path, extension: Callable[[Path], str]) -> FolderListing:
    """The files of a corpus below a folder. `extension` returns the known extension of a path, or an empty string."""
    found = FolderListing()
    for file in _walk(root, found):
        if file.name.startswith("."):
            found.left[HIDDEN] += 1
        elif not extension(file):
            found.left[OTHER] += 1
            found.formats.add(file.suffix.lower()[:12] or "no extension")
        elif is_card(file.name, extension(file)):
            found.left[ABOUT] += 1
        else:
            found.files.append(file)
    found.files.sort(key=lambda file: file.relative_to(root).as_posix())
    return found


def is_card(name: str, extension: str) -> bool:
    """Whether a file describes a corpus: `README.md`, `LICENSE-MIT.txt`, `dataset_info.json`."""
    low = name.lower()
    return low in SHEETS or (extension in TEXTS and CARD.fullmatch(low.removesuffix(extension)) is not None)


def _walk(root: Path, found: FolderListing) -> Iterator[Path]:
    """Every file below: first those in real folders, then those in linked folders. Each folder is visited once."""
    seen, waiting = {_inode(root)}, [root]
    while waiting:
        for folder, folders, names in _listed(waiting.pop(0)):
            yield from (Path(folder, name) for name in names)
            below = [Path(folder, name) for name in sorted(folders)]
            for path in below:
                if path.name.startswith("."):
                    found.left[HIDDEN] += sum(len(names) for _, _, names in _listed(path))
            below = [path for path in below if not path.name.startswith(".")]
            waiting += [path for path in below if path.is_symlink()]
            folders[:] = [path.name for path in below if not path.is_symlink() and _is_new(path, seen, found)]
        while waiting and not _is_new(waiting[0], seen, found):
            waiting.pop(0)


def _is_new(folder: Path, seen: set[tuple[int, int]], found: FolderListing) -> bool:
    """Whether a folder is met for the first time, under any name. Marks it as met."""
    inode = _inode(folder)
    if inode in seen:
        found.left[AGAIN] += 1
        return False
    seen.add(inode)
    return True


def _inode(path: Path) -> tuple[int, int]:
    with reading(path):
        status = path.stat()
    return status.st_dev, status.st_ino


def _listed(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    def fail(error: OSError) -> None:
        raise error

    with reading(root):  # not rglob, which skips folders that it may not list
        yield from os.walk(root, onerror=fail)


def all_below(root: Path) -> list[Path]:
    """Every file below a folder except those in linked folders, in no order. Raises UserError for anything that is no
    regular file."""
    files = [Path(folder, name) for folder, _, names in _listed(root) for name in names]
    for file in files:
        with reading(file):
            check_regular(file)
    return files


def check_files(root: Path) -> None:
    """Checks a folder that a library will read: the library could wait forever at a pipe. Raises UserError for anything
    that is no regular file."""
    for folder, folders, names in _listed(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            with reading(path):
                check_regular(path)


def file_identities(files: list[Path], root: Path, check_stop: StopCheck = never_stop) -> list[dict[str, Any]]:
    """The identity of files: name relative to `root`, size and hash."""
    return [_file_identity(file, root, check_stop) for file in files]


def _file_identity(file: Path, root: Path, check_stop: StopCheck) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    with reading(file), open_regular(file) as stream:
        while block := stream.read(HASHED_BYTES):
            check_stop()
            digest.update(block)
        return {"name": file.relative_to(root).as_posix(), "bytes": stream.tell(), "blake2b": digest.hexdigest()}
