"""Which files of a folder are a corpus, and what identifies files.

Left out, and counted: names that begin with a dot, cards and licences, what is of no known format, and folders that
were read already under another name. Links to folders are followed.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harvest.corpus.documents import Look, go_on
from harvest.corpus.raw_bytes import check_regular, open_regular, reading

CARD: Final = re.compile(
    r"(readme|licen[cs]e|copying|copyright|notice|changelog|contributing|code_of_conduct|citation|authors)([^a-z].*)?"
)
"""Names, in small letters, of what is written about a corpus and is no part of it."""
SHEETS: Final = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""What the `datasets` library writes about one."""
TEXTS: Final = (".txt", ".md", ".txt.gz", ".txt.zst", ".md.gz", ".md.zst")
"""A card is one of these. `notice.jsonl` is data."""
HASHED_BYTES: Final = 1 << 20
HIDDEN, ABOUT, OTHER = "hidden", "cards or licences", "of other formats"
AGAIN: Final = "folders that are read already by another name"


@dataclass
class FolderListing:
    """What is below a folder."""

    files: list[Path] = field(default_factory=list)
    """To be read, by relative path."""
    left: Counter[str] = field(default_factory=Counter)
    """How many files were left out, by the reason."""
    formats: set[str] = field(default_factory=set)
    """Last extensions of those of no known format."""

    def __str__(self) -> str:
        """`read 3 files, left out 2 (1 hidden, 1 of other formats: .png)`."""
        read = f"read {len(self.files):,} file{'s' * (len(self.files) != 1)}"
        if not self.left.total():
            return read
        named = {OTHER: ": " + ", ".join(sorted(self.formats)[:8])}
        left = [f"{count:,} {reason}{named.get(reason, '')}" for reason, count in self.left.items() if count]
        return f"{read}, left out {self.left.total():,} ({'; '.join(left)})"


def files_below(root: Path, extension: Callable[[Path], str]) -> FolderListing:
    """The files of a corpus below a folder. `extension`: the known one that a name ends in, or nothing."""
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
    """Whether a file is about a corpus: `README.md`, `LICENSE-MIT.txt`, `dataset_info.json`."""
    low = name.lower()
    return low in SHEETS or (extension in TEXTS and CARD.fullmatch(low.removesuffix(extension)) is not None)


def _walk(root: Path, found: FolderListing) -> Iterator[Path]:
    """Every file below, real folders first, then those that links lead to, each folder once."""
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
    """Whether a folder was not met yet, under whatever name. From now on it was."""
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

    with reading(root):  # os.walk and not rglob, which skips folders that it may not list
        yield from os.walk(root, onerror=fail)


def all_below(root: Path) -> list[Path]:
    """Every file below a folder but for linked folders, in no order. Raises UserError for what is no regular file."""
    files = [Path(folder, name) for folder, _, names in _listed(root) for name in names]
    for file in files:
        with reading(file):
            check_regular(file)
    return files


def check_files(root: Path) -> None:
    """For a folder that a library reads, which may wait for ever at a pipe. Raises UserError when there is one, or
    any other thing that is no regular file."""
    for folder, folders, names in _listed(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            with reading(path):
                check_regular(path)


def described(files: list[Path], root: Path, look: Look = go_on) -> list[dict[str, Any]]:
    """The identity of files: name relative to `root`, size and hash."""
    return [_described(file, root, look) for file in files]


def _described(file: Path, root: Path, look: Look) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    with reading(file), open_regular(file) as stream:
        while block := stream.read(HASHED_BYTES):
            look()
            digest.update(block)
        return {"name": file.relative_to(root).as_posix(), "bytes": stream.tell(), "blake2b": digest.hexdigest()}
