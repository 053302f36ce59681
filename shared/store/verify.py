"""Finds everything in a store that is not as it was written, and drops damaged shards so that they are harvested again.

The quick check covers the presence, length and crc32 of every file. The full check also decodes every chunk and
compares what the store says twice (shared/store/recount.py). Either way every byte of a store is read.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from shared.errors import BusyError, DamagedError, UserError
from shared.files.base import Files
from shared.gate import BadData, members, parse_json
from shared.record import sealed_json
from shared.store.manifest import read_logs, read_metadata
from shared.store.opened import (
    STATE_FILE,
    Store,
    check_metadata_paths,
    state_document,
    write_state,
)
from shared.store.reader import Reader, is_foreign, open_reader
from shared.store.recount import Recount
from shared.store.shard import crc32, file_crc
from shared.store.spec import shard_file
from shared.store.tokens import TokenRows


@dataclass
class Damage:
    """The damage that was found."""

    lines: list[str] = field(default_factory=list)
    """One line for each damaged file, in words."""
    shards: list[int] = field(default_factory=list)
    """The committed shards with damaged files: harvesting them again repairs them."""
    lasting: list[str] = field(default_factory=list)
    """The lines that harvesting again does not repair."""


def verify(store: Store, full: bool, advance: Callable[[int, str], None] | None = None) -> Damage:
    """Checks a store. `advance(bytes, note)` is called with the progress."""
    damage = Damage()
    for check in (check_missing, check_logs, check_state, check_metadata, check_record):
        try:
            check(store)
        except DamagedError as error:
            damage.lines += str(error).splitlines()
            damage.lasting += [] if check in (check_missing, check_logs) else str(error).splitlines()
    recount = recount_of(store, damage)
    for shard, lines in checked_shards(store, recount if full else None):
        damage.lines += lines
        if lines:
            damage.shards.append(shard)
        if advance:
            size = sum(n for n, _ in store.commits[shard].files.values())
            advance(size, f"{len(damage.lines)} damaged files")
    return damage


def recount_of(store: Store, damage: Damage) -> Recount:
    """Prepares the comparison of values; adds damage of tokens and array descriptions to `damage`."""
    tokens: TokenRows | None = (rows := store.token_rows(check=False))
    readers: dict[str, Reader] = {}
    try:
        check_token_ids(store, rows)
    except BusyError:  # a server that is away says nothing about the bytes
        raise
    except (DamagedError, UserError) as error:
        tokens = None
        damage.lines.append(str(error))
        damage.lasting.append(str(error))
    for array in store.spec.layouts():
        try:
            readers[array] = open_reader(store, array)
        except DamagedError as error:
            damage.lines.append(str(error))
            damage.lasting.append(str(error))
    return Recount(store, readers, tokens)


def checked_shards(store: Store, recount: Recount | None) -> Iterator[tuple[int, list[str]]]:
    """The shards in order, each with a line for every damaged file. A few are checked side by side."""
    threads = len(os.sched_getaffinity(0))
    matrices = {array for array, layout in store.spec.layouts().items() if layout.row_shape} | store.row_kinds.keys()
    left, waiting = iter(store.commits), deque[tuple[int, Future[list[str]]]]()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                for shard in islice(left, 2 * threads - len(waiting)):
                    waiting.append((shard, pool.submit(check_shard, store, recount, matrices, shard)))
                if not waiting:
                    return
                shard, found = waiting.popleft()
                yield shard, found.result()
        finally:
            pool.shutdown(cancel_futures=True)


def check_shard(store: Store, recount: Recount | None, matrices: set[str], shard: int) -> list[str]:
    """One line for every damaged file of a shard."""
    found: dict[str, str] = {}
    checked_there = recount.arrays_checked_here() if recount else set()
    for array, (size, crc) in sorted(store.commits[shard].files.items()):
        if array in checked_there:
            continue
        path = shard_file(array, shard, array in matrices)
        try:
            if file_crc(store.files.open(path, size), size) != crc:
                raise DamagedError(f"{store.name}/{path}: its checksum is not the committed one")
        except DamagedError as error:
            found[array] = str(error).split(". List all damage")[0]
    return [*found.values(), *(recount.differences(shard, set(found)) if recount else [])]


def check_token_ids(store: Store, tokens: TokenRows) -> None:
    """Raises DamagedError for ids that differ from the written ones or that the vocabulary lacks, and where a row does
    not begin as the spec says."""
    spec = store.spec
    vocab_size = spec.corpus.get("vocab_size", 1 << 32)
    for rows in tokens.blocks():
        if rows.max(initial=0) >= vocab_size:
            raise DamagedError(f"{store.name}/tokens: has the id {rows.max()}, the vocabulary has {vocab_size}")
        if spec.bos_id is not None and (rows[:, 0] != spec.bos_id).any():
            raise DamagedError(
                f"{store.name}/tokens: not every row begins with the id {spec.bos_id}, as zarr.json says"
            )


def check_state(store: Store) -> None:
    if store.files.read(STATE_FILE) != state_document(store.spec, store.state):
        raise DamagedError(f"{store.name}/{STATE_FILE}: is not as it was written")


def check_missing(store: Store) -> None:
    if store.state == "final" and (missing := store.missing):
        what = f"shards {missing}" if len(missing) <= 20 else f"{len(missing)} of its {store.spec.n_shards} shards"
        raise DamagedError(f"{store.name}: is final, but {what} are not in its manifest")


def check_logs(store: Store) -> None:
    logs = read_logs(store.files, store.spec, store.state == "final")
    cure = "Run the same sagsae harvest command again, or use --repair, to drop and rewrite its shard"
    bad = [(f"{log.path}: line {number}", why) for log in logs for number, why in log.bad.items()]
    if bad:
        lines = [f"{store.name}/{where} is torn or damaged ({why}). {cure}" for where, why in bad]
        raise DamagedError("\n".join(lines))


def check_metadata(store: Store) -> None:
    metadata, wrong = read_metadata(store.files), []
    written = store.spec.documents()
    for path, (size, crc) in metadata.items():
        try:
            data = store.files.read(path)
        except FileNotFoundError:
            wrong.append(f"{store.name}/{path}: is missing")
            continue
        if len(data) != size or crc32(data) != crc:
            wrong.append(f"{store.name}/{path}: is not as it was written")
        elif path in written and data != written[path] and not is_rewritten(store, path, data):
            wrong.append(f"{store.name}/{path}: does not say what the store's zarr.json says")
    try:
        check_metadata_paths(store, metadata)
    except DamagedError as error:
        wrong.append(str(error))
    if wrong:
        raise DamagedError("\n".join(wrong))


def is_rewritten(store: Store, path: str, data: bytes) -> bool:
    """Whether a document may be another tool's: that of an array read through zarr-python, which checks it."""
    array = path.removesuffix("/zarr.json")
    try:
        return array in store.spec.layouts() and is_foreign(store, array, parse_json(data))
    except BadData:
        return False


def check_record(store: Store) -> None:
    path = f"{store.name}/record.json"
    try:
        data = store.files.read("record.json")
        record = members(parse_json(data), ("crc32c",), None)
        record.pop("crc32c")
    except (OSError, BadData) as error:
        raise DamagedError(f"{path}: is missing or not as it was written") from error
    if sealed_json(record) != data:
        raise DamagedError(f"{path}: is not as it was written")


def repair(files: Files, shards: list[int]) -> list[int]:
    """Removes the commits of damaged shards, and bad lines, so that the same harvest command rewrites these shards.
    Nothing else is changed. Returns all shards that must be written. Raises UserError while another process is
    writing."""
    with files.explained(), files.lock(), files.unread():
        store = Store.open(files, lenient=True)
        logs = read_logs(files, store.spec, store.state == "final")
        if store.state == "final" and (store.missing or set(shards) & set(store.commits)):
            write_state(files, store.spec, "writing")
        dropped = set(shards)
        for log in logs:
            kept = [commit for commit in log.commits if commit.shard not in dropped]
            if len(kept) < len(log.commits) or log.bad:
                files.write(log.path, [commit.line().encode() for commit in kept])
    return Store.open(files).missing
