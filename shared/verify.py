"""Everything in a store that is not as it was written, and taking damaged shards back to the harvest.

Quick: the presence, length and crc32 of every file. Full: besides, every chunk is decoded and its rows counted. Either
way every byte that a store holds is looked at.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shared.errors import DamagedError
from shared.files import Files
from shared.manifest import Commit, read_logs, read_metadata
from shared.reader import open_reader, read_shard
from shared.record import sealed_json
from shared.shard import crc32, file_crc
from shared.spec import shard_file
from shared.store import STATE_FILE, Store, state_document, write_state


@dataclass
class Damage:
    """What was found."""

    lines: list[str] = field(default_factory=list)
    """One for each damaged file, in words."""
    shards: list[int] = field(default_factory=list)
    """The committed shards that have damaged files: harvesting them again mends them."""
    lasting: list[str] = field(default_factory=list)
    """The lines that harvesting again does not mend."""


def verify(store: Store, full: bool, advance: Callable[[int, str], None] | None = None) -> Damage:
    """`advance(bytes, note)` is told of progress."""
    damage = Damage()
    for check in (check_missing, check_logs, check_state, check_metadata, check_record, check_tokens):
        try:
            check(store)
        except DamagedError as error:
            damage.lines += str(error).splitlines()
            damage.lasting += [] if check in (check_missing, check_logs) else str(error).splitlines()
    for shard, commit in store.commits.items():
        before = len(damage.lines)
        for array in sorted(store.spec.arrays() | set(commit.files)):
            damage.lines += check_file(store, commit, array, full)
            if advance:
                advance(commit.files.get(array, (0, 0))[0], f"{len(damage.lines)} damaged files")
        if len(damage.lines) > before:
            damage.shards.append(shard)
    return damage


def check_state(store: Store) -> None:
    if store.files.read(STATE_FILE) != state_document(store.spec, store.state):
        raise DamagedError(f"{store.name}/{STATE_FILE}: is not as it was written")


def check_missing(store: Store) -> None:
    if store.state == "final" and store.missing:
        raise DamagedError(f"{store.name}: is final, but shards {store.missing} are not in its manifest")
    for commit in store.commits.values():
        if (commit.start, commit.stop) != store.spec.shard_range(commit.shard):
            raise DamagedError(f"{store.name}: shard {commit.shard} is committed for other rows than it has")
        if commit.rows != commit.stop - commit.start:
            raise DamagedError(f"{store.name}: shard {commit.shard} is committed with a number of rows that it has not")


def check_logs(store: Store) -> None:
    cure = "The same sagsae harvest command again, or --repair, gives up its shard and writes it anew"
    bad = [
        (log.path, number) for log in read_logs(store.files, store.spec, store.state == "final") for number in log.bad
    ]
    if bad:
        lines = (f"{store.name}/{path}: line {number} is torn or damaged. {cure}" for path, number in bad)
        raise DamagedError("\n".join(lines))


def check_metadata(store: Store) -> None:
    wrong = []
    for path, (size, crc) in read_metadata(store.files).items():
        try:
            data = store.files.read(path)
        except FileNotFoundError:
            wrong.append(f"{store.name}/{path}: is missing")
            continue
        if len(data) != size or crc32(data) != crc:
            wrong.append(f"{store.name}/{path}: is not as it was written")
    if wrong:
        raise DamagedError("\n".join(wrong))


def check_record(store: Store) -> None:
    path = f"{store.name}/record.json"
    try:
        data = store.files.read("record.json")
        record: dict[str, Any] = json.loads(data)
        record.pop("crc32c")
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{path}: is missing or not as it was written") from error
    if sealed_json(record) != data:
        raise DamagedError(f"{path}: is not as it was written")


def check_tokens(store: Store) -> None:
    store.token_rows()


def check_file(store: Store, commit: Commit, array: str, full: bool) -> list[str]:
    """One line when the file of a shard in one array is damaged."""
    layout = store.spec.layouts().get(array)
    path = shard_file(array, commit.shard, layout is None or bool(layout.row_shape))
    what = f"{store.name}/{path}"
    if array not in commit.files or array not in store.spec.arrays():
        return [f"{what}: the commit and the store do not name the same files"]
    size, crc = commit.files[array]
    try:
        if file_crc(store.files.open(path, size), size) != crc:
            raise DamagedError(f"{what}: its checksum is not the committed one")
        if full and layout is not None:
            read_shard(open_reader(store, array), commit.shard)
    except DamagedError as error:
        return [str(error).split(". List all damage")[0]]
    return []


def repair(files: Files, shards: list[int]) -> list[int]:
    """Takes back the commits of damaged shards, and bad lines, so that the same harvest command writes these shards
    again. Nothing else is touched. Gives all shards that are to be written. Raises UserError while somebody writes."""
    with files.explained(), files.lock():
        store = Store.open(files, lenient=True)
        logs = read_logs(files, store.spec, store.state == "final")
        if store.state == "final" and (store.missing or set(shards) & set(store.commits)):
            write_state(files, store.spec, "writing")
        given_up = set(shards)
        for log in logs:
            kept = [commit for commit in log.commits if commit.shard not in given_up]
            if len(kept) < len(log.commits) or log.bad:
                files.write(log.path, [commit.line().encode() for commit in kept])
    return Store.open(files).missing
