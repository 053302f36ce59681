"""Rewrites a store with another codec, shard by shard. Everything else stays the same, byte for byte.

The result is the store that a harvest with that codec would have written: the same rows in the same order with the same
moments, and for int8 the same scales. An interrupted recode resumes when you run it again.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from harvest.encode import Fetch, ShardFiles
from shared.errors import DamagedError, Interrupted, UserError
from shared.files.base import Files, Write
from shared.files.handles import Buffer
from shared.files.local import LocalFiles
from shared.files.open import open_files
from shared.progress import progress, say
from shared.record import provenance
from shared.stop import stop_requests
from shared.store.create import clean_up, create_store, finish_store, is_ours, reopen_store
from shared.store.manifest import Sizes, append_commit, read_metadata
from shared.store.opened import Store, check_metadata_paths, is_store
from shared.store.reader import ArrayReader, Reader, open_reader, read_places, read_shard
from shared.store.shard import BLOCK_BYTES, CodecName, crc32
from shared.store.spec import StoreSpec, shard_file
from shared.store.tokens import CountedMask, TokenMask


@dataclass(frozen=True)
class RecodeSummary:
    """The result of a recode."""

    store: str
    codec: str
    tokens: int
    bytes_before: int
    bytes_after: int


def recode(source: str, target: str, codec: CodecName) -> RecodeSummary:
    """Rewrites the store `source` at `target`. Raises UserError for unusable input, DamagedError where the source is
    damaged, Interrupted after a signal."""
    store, files = Store.open(source), open_files(target)
    if store.spec.quantised:
        raise UserError(f"{source}: is quantised to int8, which lost what other codecs would keep. Harvest it again")
    if codec == "int8" and store.commits.columns.nonfinite is not None:
        raise UserError(f"{source}: has rows with NaN or infinities, which int8 cannot hold. Choose another codec")
    if store.state != "final" or store.missing:
        raise UserError(f"{source}: is unfinished. Run sagsae harvest to its end first")
    spec = store.spec.model_copy(update={"codec": codec})
    check_target(files, spec)
    with files.explained(), store.files.reading():
        if isinstance(files, LocalFiles):
            files.root.mkdir(parents=True, exist_ok=True)
        write_store(store, files, spec)
    done = Store.open(files)
    before, after = (sum(s.stored_bytes(hook) for hook in spec.hookpoints) for s in (store, done))
    return RecodeSummary(target, codec, done.n_rows, before, after)


def write_store(store: Store, files: Files, spec: StoreSpec) -> None:
    """Writes the new store, or the part of it that is missing."""
    with files.lock():
        if not is_store(files):
            begin_recode(store, files, spec)
        clean_up(files)
        done = Store.open(files)
        if done.state == "final" and not done.missing:
            say(f"{files.name} is complete. Nothing to do.")
            return
        reopen_store(done)
        recode_shards(store, done)
        finish_store(files, spec)


def check_target(files: Files, spec: StoreSpec) -> None:
    """Raises UserError when something else is at the target."""
    if is_store(files):
        if Store.open(files).spec != spec:
            raise UserError(f"{files.name}: is another store, or was recoded differently. Choose another DST")
        return
    root = files.root if isinstance(files, LocalFiles) and files.root.exists() else None
    if root and (not root.is_dir() or any(not is_ours(path.name) for path in root.iterdir())):
        raise UserError(f"{files.name}: exists and is not a store. Choose another DST")


def begin_recode(store: Store, files: Files, spec: StoreSpec) -> None:
    metadata = read_metadata(store.files)
    check_metadata_paths(store, metadata)
    tokens = {path: metadata[path] for path in store.spec.token_files()}
    for path, (size, crc) in tokens.items():
        copy(store.files, files.write, path, size, crc)
    create_store(files, spec, tokens, {**provenance(), "source": store.name})


def recode_shards(store: Store, done: Store) -> None:
    """Writes and commits every missing shard."""
    todo = done.missing
    keep = CountedMask(store.token_rows())
    rows = store.commits.only(todo).n_rows
    with (
        stop_requests() as stop_asked,
        closing(ShardFiles(done.spec)) as writer,
        progress("recode", rows, "tokens") as advance,
    ):
        for shard in todo:
            recode_shard(store, done, writer, shard, keep)
            advance(store.commits[shard].rows, done.spec.codec)
            if stop_asked():
                raise Interrupted(f"{done.name}: stopped. To continue, run the same command again")


def recode_shard(store: Store, done: Store, writer: ShardFiles, shard: int, keep: TokenMask) -> None:
    """Rewrites one shard. `keep` marks the rows that the moments are over. Raises DamagedError where the source is
    damaged."""
    commit = store.commits[shard]
    contexts, positions = (open_reader(store, f"index/{name}") for name in ("context", "position"))
    kept = keep[commit.start : commit.stop][read_places(contexts, positions, shard)]
    files: Sizes = {}
    with done.files.together() as write:
        for array in sorted(store.spec.arrays() - store.spec.hookpoints.keys()):
            size, crc = commit.files[array]
            matrix = array in store.row_kinds  # the others are vectors
            reader = None if matrix else open_reader(store, array)
            if reader is not None and not isinstance(reader, ArrayReader):  # another tool's bytes
                files |= writer.write_vector(write, array, shard, read_shard(reader, shard))
            else:
                files[array] = copy(store.files, write, shard_file(array, shard, matrix), size, crc)
        for hook in store.spec.hookpoints:
            squares = store.row_of_shard(f"stats/{hook}/sum_of_squares", shard)
            fetch = fetch_from(open_reader(store, hook), shard)
            files |= writer.write_activations(write, hook, shard, commit.rows, fetch, squares, kept)
    append_commit(done.files, 0, replace(commit, files=files))


def fetch_from(reader: Reader, shard: int) -> Fetch:
    def fetch(at: slice, out: NDArray[Any]) -> None:
        reader.read(shard, at.start // reader.layout.chunk_rows, out)

    return fetch


def copy(source: Files, write: Write, path: str, size: int, crc: int) -> tuple[int, int]:
    """Copies a committed file and checks it on the way. Raises DamagedError where its checksum is wrong."""
    file, found = source.open(path, size), 0

    def pieces() -> Iterator[Buffer]:
        nonlocal found
        for at in range(0, size, BLOCK_BYTES):
            block = bytes(file.read(at, min(BLOCK_BYTES, size - at)))
            found = crc32(block, found)
            yield block
        if found != crc:
            raise DamagedError(f"{source.name}/{path}: its checksum is not the committed one")

    write(path, pieces())
    return size, crc
