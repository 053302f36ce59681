"""Identifies the rows that a run reads by their content, not by their location, name or encoding.

A run records the numbers of its shards and one digest of their content. The digest covers the committed checksums of
all files that a lossless recode copies byte for byte (row norms and sums among them) but not the activations' own
files: so it is equal across lossless codecs, and differs where the activations differ. Int8 has only one encoding, and
there all files count.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import BusyError, DamagedError, UserError
from shared.files.local import LocalFiles
from shared.gate import BadData, quoted
from shared.store.commits import KEPT
from shared.store.manifest import INDEX
from shared.store.opened import STATE_FILE, Store

FOLLOWS: Final = "follows "
EARLIER: Final = re.compile(r"[0-9a-f]{8}-[0-9]+")
"""A snapshot id as earlier versions of sagsae wrote it: a digest of all bytes of the manifest."""


def content_of_spec(store: Store, hook: str) -> str:
    """Returns a digest of everything in a store's description that decides the rows of one hookpoint and their
    order."""
    spec = store.spec
    decides = {
        "ids": spec.corpus["ids_blake2b"],
        "context": spec.context,
        "special_ids": list(spec.special_ids),
        "skip_positions": spec.skip_positions,
        "n_tokens": spec.n_tokens,
        "hook_name": spec.hookpoints[hook].name,
        "d_in": spec.hookpoints[hook].d_in,
        "dtype": spec.dtype,
        "quantised": spec.quantised,
        "chunk_rows": spec.chunk_rows,
        "shard_rows": spec.shard_rows,
        "seed": spec.seed,
    }
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).hexdigest()


def arrays_of(store: Store, hook: str) -> list[str]:
    """Returns the paths of the arrays that identify a hookpoint's rows and that a lossless recode copies unchanged."""
    paths = ["index/context", "index/position", *(f"stats/{hook}/{name}" for name in ("norm", "sum", "sum_of_squares"))]
    if store.spec.quantised:
        paths += [hook, f"scale/{hook}/row", f"scale/{hook}/dim", f"stats/{hook}/sum_of_squared_error"]
    return paths


def content_of(store: Store, hook: str, exact: bool = False) -> str:
    """Returns a digest of the rows of one hookpoint in the committed shards. With `exact` it also covers their
    encoding."""
    paths = [*arrays_of(store, hook), *([hook] if exact else [])]
    digest = hashlib.blake2b(content_of_spec(store, hook).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(table_of(store, paths).T, "<i8").tobytes())
    return digest.hexdigest()


def table_of(store: Store, paths: Sequence[str]) -> NDArray[np.int64]:
    """Returns one line per committed shard, sorted: its number, its rows, where they begin and end, and the length and
    crc32 of each of its files: [shards, 4 + 2 * paths]."""
    columns = store.commits.columns
    places = [columns.places[path] for path in paths]
    files = np.stack([columns.sizes[:, places], columns.crcs[:, places].astype(np.int64)], axis=2)
    return np.hstack([columns.numbers[:, :KEPT], files.reshape(len(columns), -1)])


def is_earlier(identity: dict[str, Any]) -> bool:
    """Whether an earlier version of sagsae began the run. Those named snapshots differently and cut long warm-ups."""
    return re.fullmatch(rf"{EARLIER.pattern}|{FOLLOWS}[0-9a-f]{{8}}", str(identity.get("snapshot"))) is not None


def followed_snapshot(store: Store, hook: str) -> str:
    """Returns the placeholder snapshot id of a run with `--follow`, which reads every shard the store will have."""
    return FOLLOWS + content_of_spec(store, hook)


# Shard numbers as text: "0-4,7"


def as_ranges(numbers: Iterable[int]) -> str:
    """Returns `0-2,7` for `[0, 1, 2, 7]`. A store that was committed from its beginning is one range."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def from_ranges(text: Any, most: int) -> list[int]:
    """Returns the numbers of a text such as `0-4,7`. Raises BadData unless they rise and are below `most`."""
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,13}(-[0-9]{1,13})?(,[0-9]{1,13}(-[0-9]{1,13})?)*", text):
        raise BadData(f"shards is {quoted(text)} instead of numbers such as 0-4,7")
    numbers: list[int] = []
    last = -1
    for part in text.split(","):
        first, _, end = part.partition("-")
        low, high = int(first), int(end or first)
        if not last < low <= high:
            raise BadData(f"shards is {quoted(text)}, which is not in order")
        if high >= most:
            raise BadData(f"shards is {quoted(text)}; the store has {most:,} shards")
        numbers += range(low, high + 1)
        last = high
    return numbers


# Finding the recorded shards again


def as_recorded(store: Store, hook: str, identity: dict[str, Any], what: str) -> Store:
    """Returns the store restricted to the shards that a run read. `identity` is the run's config.json, `what` its
    folder. Raises UserError when the store lacks one of them, or one has other content."""
    snapshot = str(identity.get("snapshot"))
    if snapshot.startswith(FOLLOWS):
        if snapshot not in (followed_snapshot(store, hook), f"{FOLLOWS}{store.spec_id}"):
            raise UserError(f"{what}: {other_store_text(store)}")
        return store
    if "shards" not in identity and EARLIER.fullmatch(snapshot):
        if snapshot != store.snapshot_id:
            raise UserError(
                f"{what}: was not trained on what {store.name} holds now: it grew since, or it is another store. Name "
                "the right one with --store"
            )
        return store
    try:
        shards = from_ranges(identity.get("shards"), store.spec.n_shards)
    except BadData as error:
        raise UserError(f"{what}: {other_store_text(store)} ({error})") from error
    gone = [shard for shard in shards if shard not in store.commits]
    if gone:
        raise UserError(
            f"{what}: was trained on shards {identity['shards']} of its store; {store.name} does not have "
            f"{len(gone):,} of them, such as shard {gone[0]}. Name the right store with --store"
        )
    part = store.only(shards)
    if content_of(part, hook) != snapshot:
        raise UserError(f"{what}: {other_store_text(store)}")
    return part


def other_store_text(store: Store) -> str:
    lossy = ". It is quantised to int8, which changes rows; lossless codecs keep them" if store.spec.quantised else ""
    return (
        f"was not trained on the rows that {store.name} holds now: it is another store, or was harvested again{lossy}. "
        "Name the right store with --store"
    )


# A store that is replaced while it is read


@dataclass
class SnapshotWatch:
    """Detects that a store was replaced, or lost shards, while its rows were read. A store that grew is accepted."""

    store: Store
    hook: str
    seen: object = None
    """The file signature of the store (`file_signature`) when its content was last compared."""

    def check(self, parts: Sequence[Store], thorough: bool = False) -> None:
        """Raises DamagedError when the store no longer holds the shards of `parts` (the stores that were read) with the
        same content. While the file signature is unchanged this costs a few calls of stat; `thorough` compares the
        content all the same."""
        signature = file_signature(self.store)
        if signature == self.seen and signature is not None and not thorough:
            return
        try:
            now = Store.open(self.store.files)
        except BusyError:  # its server is away for a while; the store is not
            raise
        except UserError as error:
            raise DamagedError(f"{self.store.name}: disappeared while it was read. {AGAIN} ({error})") from error
        for part in parts:
            kept = all(shard in now.commits for shard in part.commits)
            if not kept or exact_content(now.only(list(part.commits)), self.hook) != exact_content(part, self.hook):
                raise DamagedError(f"{self.store.name}: was replaced, or lost shards, while it was read. {AGAIN}")
        self.seen = signature


AGAIN: Final = "Put the store back as it was and run the same command again; nothing read since is kept"


def exact_content(store: Store, hook: str) -> str | None:
    """Returns the digest of a hookpoint's rows and their encoding, or None when the store does not have it."""
    return content_of(store, hook, exact=True) if hook in store.spec.hookpoints else None


def file_signature(store: Store) -> object:
    """Returns device, inode, size and modification time of the files that describe a store. For a remote store it
    returns the content of its state file, or None when that cannot be read."""
    if not isinstance(store.files, LocalFiles):
        try:
            return store.files.read(STATE_FILE)
        except (OSError, UserError, DamagedError):
            return None
    signature: list[tuple[Any, ...]] = []
    for path in (STATE_FILE, INDEX, *store.files.logs("manifest", "rank-")):
        try:
            found = os.stat(store.root / path)
        except OSError:
            signature.append((path,))
        else:
            signature.append((path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
    return signature
