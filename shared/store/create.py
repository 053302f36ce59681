"""The life of a store on disk: its tokens, its empty arrays, its end. Everything that is written only once is written
here.

The order makes it safe. First comes everything that no commit covers, with its checksums; then the store's own
zarr.json, with which the store exists; then the commits; and at the end one sorted index of them.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import BusyError, DamagedError, UserError
from shared.files.base import Files
from shared.files.handles import retry_interrupted
from shared.files.local import LocalFiles, explained, read_whole, remove_temporaries, sync
from shared.files.locks import HELD_FILE, LOCK_FILE
from shared.record import sealed_json
from shared.store.commits import Commits
from shared.store.manifest import Sizes, cut_torn_lines, read_manifest, remove_logs, write_index, write_metadata
from shared.store.opened import STATE_FILE, Store, read_state, write_state
from shared.store.shard import crc32, decode_chunk, encode_chunk, pad_chunk, with_crc
from shared.store.spec import StoreSpec, TokenType, shard_file, token_layout

BUILDING: Final = "tokens.building"
SECONDS_BEHIND: Final = 10
RECORD: Final = "record.json"
DELETING: Final = "deleting.tmp"
"""Marks a folder without zarr.json as a store whose deletion was interrupted."""
OURS: Final = {LOCK_FILE, STATE_FILE, RECORD, BUILDING, "tokens", "index", "stats", "scale", "manifest"}


def is_ours(name: str) -> bool:
    """Whether a store puts something of this name into its folder. Nothing else is ever deleted there."""
    return name in OURS or name.startswith(("layer_", f"{LOCK_FILE}.")) or name.endswith(".tmp")


@dataclass(frozen=True)
class WrittenTokens:
    """Token rows that were written, not yet in their final place."""

    folder: Path
    dtype: TokenType
    rows: int
    digest: str
    files: Sizes


@contextmanager
def building(files: Files) -> Iterator[Path]:
    """An empty folder for tokens: inside a local store, or else a temporary folder. Deleted at the end unless
    `place_tokens` moved it."""
    if isinstance(files, LocalFiles):
        folder = files.root / BUILDING
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        with tempfile.TemporaryDirectory() as folder_name, explained(folder_name):
            yield Path(folder_name) / BUILDING


class TokenWriter:
    """Writes rows [n, context] as the chunks of an array."""

    def __init__(self, folder: Path, context: int, vocab_size: int) -> None:
        self.folder, self.here = folder, LocalFiles(folder)
        self.dtype: TokenType = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.layout = token_layout(context, self.dtype)
        self.digest, self.rows = hashlib.blake2b(digest_size=16), 0
        self.files: Sizes = {}
        self.chunk = np.empty(self.layout.chunk_shape, self.layout.dtype)
        self.filled = 0
        """Rows in `chunk` that are not written yet."""

    @property
    def held(self) -> NDArray[Any]:
        return self.chunk[: self.filled]

    def add(self, block: NDArray[Any]) -> None:
        for start in range(0, len(block), self.layout.chunk_rows):
            self._add(block[start : start + self.layout.chunk_rows])

    def _add(self, block: NDArray[Any]) -> None:
        """Adds at most one chunk of rows."""
        fitting = min(len(block), self.layout.chunk_rows - self.filled)
        self.chunk[self.filled : self.filled + fitting] = block[:fitting]
        self.filled += fitting
        if self.filled == self.layout.chunk_rows:
            self._write()
            self.chunk[: len(block) - fitting] = block[fitting:]
            self.filled = len(block) - fitting

    def close(self) -> WrittenTokens:
        """Writes the last chunk, which may have fewer rows."""
        if self.filled:
            self._write()
        return WrittenTokens(self.folder, self.dtype, self.rows, self.digest.hexdigest(), self.files)

    def reopen(self, files: Sizes, held: NDArray[Any]) -> None:
        """Resumes after the chunks in `files`. Raises DamagedError when they are not what was written."""
        for number, (path, (size, crc)) in enumerate(files.items()):
            data = read_whole(self.folder / "c" / str(number) / "0", size)
            if (path, len(data), crc32(data)) != (shard_file("tokens", number, True), size, crc):
                raise DamagedError(f"{self.folder}: chunk {number} is not what was written")
            decode_chunk(data, self.layout, self.chunk, str(self.folder))
            self.digest.update(self.chunk.tobytes())
        self.rows, self.files = len(files) * self.layout.chunk_rows, dict(files)
        self.add(held)

    def _write(self) -> None:
        number, ids = len(self.files), self.held
        data = with_crc(encode_chunk(pad_chunk(ids, self.layout), self.layout.codec))
        self.here.write(f"c/{number}/0", [data])
        self.files[shard_file("tokens", number, True)] = (len(data), crc32(data))
        self.digest.update(ids.tobytes())
        self.rows += len(ids)


def write_tokens(folder: Path, blocks: Iterable[NDArray[Any]], context: int, vocab_size: int) -> WrittenTokens:
    """Writes rows [n, context] as the chunks of an array."""
    writer = TokenWriter(folder, context, vocab_size)
    for block in blocks:
        writer.add(block)
    return writer.close()


def place_tokens(files: Files, tokens: WrittenTokens) -> None:
    """Moves the rows that `write_tokens` wrote to their final place."""
    if isinstance(files, LocalFiles):
        tokens.folder.rename(files.root / "tokens")
        sync(files.root)
    else:
        for path in tokens.files:
            files.write(path, [(tokens.folder.parent / path.replace("tokens", BUILDING, 1)).read_bytes()])


def create_store(files: Files, spec: StoreSpec, token_files: Sizes, record: dict[str, Any]) -> None:
    """Creates an empty store around tokens that are in their place. The store exists once its zarr.json, the last file,
    is written."""
    documents = spec.documents()
    for path, data in documents.items():
        files.write(path, [data])
    files.write(RECORD, [sealed_json(record)])
    write_metadata(files, {**token_files, **{path: (len(data), crc32(data)) for path, data in documents.items()}})
    write_state(files, spec, "writing")


def clean_up(files: Files) -> None:
    """Deletes temporary files and torn lines after a crash. The caller holds the lock."""
    if isinstance(files, LocalFiles):
        cut_torn_lines(files)
        spec, _ = read_state(files)
        remove_temporaries(files.root, ["tokens"])
        remove_temporaries(files.root, spec.arrays(), read_manifest(files, spec, final=False))
    files.join_logs("manifest", "rank-")


def reopen_store(store: Store) -> None:
    """Marks a final store that lost commits as being written: until it is final again, its commits are in more places
    than the index."""
    if store.state == "final":
        write_state(store.files, store.spec, "writing")


def finish_store(files: Files, spec: StoreSpec) -> None:
    """Finishes a store whose shards are all committed: writes the sorted index, deletes the logs, and sets the state
    last. A final store is not changed any further. Nothing in it shows how many processes wrote, or in what order."""
    write_index(files, all_commits(files, spec))
    remove_logs(files)
    if isinstance(files, LocalFiles):  # another writer may have been killed since this one cleaned up
        remove_temporaries(files.root, spec.arrays())
    write_state(files, spec, "final")
    if isinstance(files, LocalFiles):
        for path in files.root.glob(f"{LOCK_FILE}.[0-9]*"):  # the locks of the other writers, which are done
            path.unlink(missing_ok=True)


def all_commits(files: Files, spec: StoreSpec) -> Commits:
    """The commits of every shard. A shared file system may show the writes of other machines some seconds late; raises
    BusyError when commits are still missing after SECONDS_BEHIND."""
    for last in (*[False] * SECONDS_BEHIND, True):
        commits = read_manifest(files, spec, final=False)
        if len(commits) == spec.n_shards:
            return commits
        if not last:
            time.sleep(1)
    raise BusyError(
        f"{files.name}: only {len(commits)} of {spec.n_shards} shards are in the manifest. Nothing is lost: run the "
        "same command again"
    )


def what_is_deleted(files: Files) -> str:
    """Describes what `remove_store` would delete. Raises UserError when there is neither a store nor the rest of
    one."""
    try:
        files.read(DELETING)
    except FileNotFoundError:
        spec, _ = read_state(files)
        return f"{spec.n_tokens:,} tokens of {spec.model['name']}"
    return "what is left of a store"


def remove_store(files: Files) -> None:
    """Deletes a store that no process is writing to or reading, or the rest of one whose deletion was interrupted. Its
    zarr.json is deleted first, so that a rest is never taken for a store; the mark of a rest is deleted last. A local
    folder is deleted too, unless it holds anything else."""
    what_is_deleted(files)
    with files.lock(), files.unread():
        files.check_removable(is_ours)
        with suppress(OSError, UserError):  # on a full disk the mark cannot be written, but the store can be deleted
            files.write(DELETING, [])
        files.remove(STATE_FILE)
        clear_store(files, keep=(LOCK_FILE, DELETING))
    files.remove(LOCK_FILE)
    files.remove(DELETING)
    if isinstance(files, LocalFiles) and not any(files.root.iterdir()):
        with suppress(OSError):  # a leftover empty folder does no harm
            retry_interrupted(files.root.rmdir)


def check_replaceable(files: Files) -> None:
    """Raises UserError where the existing store could not be deleted, or is being read."""
    with files.unread():
        files.check_removable(is_ours)


def delete_old_store(files: Files, building: str) -> None:
    """Deletes the existing store, except the folder with the tokens of the next one. Its zarr.json is deleted first."""
    with files.unread():
        files.check_removable(is_ours)
        files.remove(STATE_FILE)
        clear_store(files, keep=(LOCK_FILE, building))


def clear_store(files: Files, keep: tuple[str, ...] = (LOCK_FILE,)) -> None:
    """Deletes everything that a store puts into its folder, except `keep` and the file that replaces a held lock."""
    files.clear(lambda name: is_ours(name) and name not in keep and not name.startswith(HELD_FILE))
