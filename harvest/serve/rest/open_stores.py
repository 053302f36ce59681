"""The stores whose files are being served, and which of their files exist.

The spec and the manifest say what a store's files are, never the file system: a path that neither names is not opened,
whatever it leads to. No link is followed, in no part of the path.
"""

import errno
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from shared.files.local import LocalFiles
from shared.gate import BadData, safe_path
from shared.refusals import UnknownError
from shared.store.create import RECORD
from shared.store.manifest import INDEX, METADATA, Sizes, read_metadata
from shared.store.opened import STATE_FILE, GrowingStore, Store, state_document
from shared.store.spec import shard_file

KEPT: Final = 16
"""Stores whose manifest is kept in memory."""
SHARD: Final = re.compile(r"(.+)/c/(0|[1-9][0-9]{0,8})(/0)?")
LOG: Final = re.compile(r"manifest/(rank-|index)[\w.-]*\.jsonl")
NO_LINK: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
LINKS: Final = (errno.ELOOP, errno.EMLINK, errno.ENXIO)


@dataclass(frozen=True)
class StoreFile:
    """A file that a store has."""

    path: str
    size: int | None = None
    """The committed length in bytes; None for a file that changes."""
    crc: int | None = None
    """The committed crc32; None for a file that changes."""


@dataclass(frozen=True)
class ServedStore:
    """A snapshot of a store, and the files that belong to it."""

    store: Store
    mark: Any
    """The state of the files that the snapshot was read from."""

    @property
    def document(self) -> bytes:
        """The store's zarr.json as it was at the snapshot."""
        return state_document(self.store.spec, self.store.state)

    @cached_property
    def metadata(self) -> Sizes:
        """Lengths and checksums of the files that no commit covers."""
        return read_metadata(self.store.files)

    @cached_property
    def known(self) -> frozenset[str]:
        """Files beside the shards' that a store of this spec has."""
        return frozenset({*self.store.spec.token_files(), *self.store.spec.documents()})

    @cached_property
    def arrays(self) -> dict[str, bool]:
        """Every array in which a shard has a file, and whether it is a matrix."""
        spec = self.store.spec
        return {
            **{path: bool(one.row_shape) for path, one in spec.layouts().items()},
            **dict.fromkeys(spec.rows_of_shards(), True),
        }

    def find(self, path: str) -> StoreFile | None:
        """The file at a path; None where the spec and the manifest name none."""
        if path in (STATE_FILE, RECORD, METADATA, INDEX) or LOG.fullmatch(path):
            return StoreFile(path)
        if path in self.known:
            size, crc = self.metadata[path]
            return StoreFile(path, size, crc)
        if not (parts := SHARD.fullmatch(path)) or parts[1] not in self.arrays:
            return None
        array, shard = parts[1], int(parts[2])
        if shard_file(array, shard, self.arrays[array]) != path:
            return None
        row = self.store.commits.row(shard)
        if row is None:
            return None
        columns = self.store.commits.columns
        place = columns.places[array]
        return StoreFile(path, int(columns.sizes[row, place]), int(columns.crcs[row, place]))


class OpenStores:
    """Opens each store once, and again when its files say something new. Used from many threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.Lock()
        self.growing: OrderedDict[str, tuple[threading.Lock, GrowingStore]] = OrderedDict()
        self.served: dict[str, ServedStore] = {}

    def folder(self, name: str) -> Path:
        """A store's folder. Raises UnknownError for a name that no folder of a store can have, and for a link."""
        folder = self.root / name
        if not re.fullmatch(r"\w[\w.-]{0,254}", name) or folder.is_symlink() or not (folder / STATE_FILE).is_file():
            raise UnknownError(f"store {name[:100]!r}: there is none of this id. List them with: sagsae store ls")
        return folder

    def open(self, name: str) -> ServedStore:
        """The present state of a store. Raises UnknownError, UserError, DamagedError."""
        files = LocalFiles(self.folder(name))
        with self.lock:
            lock, growing = self.growing.setdefault(name, (threading.Lock(), GrowingStore(files)))
            self.growing.move_to_end(name)
            while len(self.growing) > KEPT:
                self.served.pop(self.growing.popitem(last=False)[0], None)
        with lock:
            mark = mark_of(files)
            found = self.served.get(name)
            if found is None or found.mark != mark:
                found = self.served[name] = ServedStore(growing.open(), mark)
            return found


def mark_of(files: LocalFiles) -> Any:
    """Changes whenever the spec, the state or the manifest does."""
    about = (files.root / STATE_FILE).stat()
    return (
        about.st_ino,
        about.st_mtime_ns,
        about.st_size,
        files.marks("manifest", "rank-"),
        files.marks("manifest", "index"),
    )


@contextmanager
def opened(root: Path, path: str) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of the regular file at a path below `root`, and its status. No part of the path may be a link.
    Raises FileNotFoundError for anything else than such a file."""
    try:
        *folders, name = safe_path(path).split("/")
    except BadData as error:
        raise FileNotFoundError(path) from error
    handles = [os.open(root, NO_LINK | os.O_DIRECTORY)]
    try:
        for folder in folders:
            handles.append(os.open(folder, NO_LINK | os.O_DIRECTORY, dir_fd=handles[-1]))
        handles.append(os.open(name, NO_LINK, dir_fd=handles[-1]))
        status = os.fstat(handles[-1])
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(path)
        yield handles[-1], status
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno in LINKS:
            raise FileNotFoundError(path) from error
        raise
    finally:
        for handle in handles:
            with suppress(OSError):
                os.close(handle)
