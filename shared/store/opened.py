"""A store opened for reading: its spec, its commits, its tokens and its statistics.

docs/reference/store-format.md is the specification. Three rules carry the weight. The manifest, never the file system
or an array's shape, says what exists: in Zarr a missing shard silently reads as fill values. A shard counts once its
files are complete, synced and renamed and its manifest line is synced. Every chunk read is checked against its crc32c.
"""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError, UserError
from shared.files.base import Files, is_remote, parent_of
from shared.files.handles import VERIFY
from shared.files.local import LocalFiles, error_kind, in_words
from shared.files.open import open_files
from shared.gate import BadData, choice, members, parse_json, quoted
from shared.store.commits import Commits
from shared.store.manifest import AT_ONCE, METADATA, Manifest, Sizes
from shared.store.shard import crc32c, without_crc
from shared.store.spec import FORMAT_VERSION, StoreSpec, as_bytes, is_sealed, read_spec, seal, shard_file
from shared.store.tokens import TokenRows

STATE_FILE: Final = "zarr.json"
ROWS_ADDED: Final = 1024
"""Rows of per-shard statistics in memory at a time."""
State = Literal["writing", "final"]
STATES: Final[tuple[State, State]] = ("writing", "final")


def state_document(spec: StoreSpec, state: State) -> bytes:
    """The store's own zarr.json. It carries a crc32c of its content, because a changed letter would go unnoticed."""
    attributes = {"sagsae": seal({**spec.as_json(), "state": state})}
    return as_bytes({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def spec_id(spec: StoreSpec) -> str:
    """An id of the store that has this spec when it is final."""
    return f"{crc32c(state_document(spec, 'final')):08x}"


def write_state(files: Files, spec: StoreSpec, state: State) -> None:
    files.write(STATE_FILE, [state_document(spec, state)])


def read_state(files: Files) -> tuple[StoreSpec, State]:
    """The spec and the state. Raises UserError when there is no store of ours, DamagedError when it was altered."""
    try:
        about = sagsae_of(files.read(STATE_FILE))
    except FileNotFoundError as error:
        there = not isinstance(files, LocalFiles) or files.root.exists()
        what = "holds no store (there is no zarr.json in it)" if there else "does not exist"
        raise UserError(f"{files.name}: {what}. Make a store with: sagsae harvest") from error
    except (OSError, BadData) as error:
        raise UserError(f"{files.name}: is not a store written by sagsae harvest (zarr.json {error})") from error
    version = about["format_version"]
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        what = "Install a newer sagsae" if newer else "Harvest it again, or read it with the sagsae that wrote it"
        raise UserError(
            f"{files.name}: is in store format {quoted(version, 20)}; this sagsae reads format {FORMAT_VERSION}. {what}"
        )
    if not is_sealed(about):
        raise DamagedError(f"{files.name}/{STATE_FILE}: its checksum does not match. Restore it from a copy")
    try:
        values = {key: value for key, value in about.items() if key not in ("state", "crc32c")}
        return read_spec(values), choice(about.get("state"), "state", STATES)
    except BadData as error:
        raise UserError(f"{files.name}: zarr.json does not describe a store ({error})") from error


def sagsae_of(data: bytes) -> dict[str, Any]:
    """`attributes.sagsae` of a store's zarr.json. Raises BadData when it is missing."""
    attributes = members(members(parse_json(data), ("attributes",), None)["attributes"], ("sagsae",), None)
    return members(attributes["sagsae"], ("format_version",), None)


@dataclass(frozen=True)
class Statistics:
    """Exact moments of one hookpoint over the rows that count, accumulated in float64 before any quantisation."""

    n: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    @property
    def scale(self) -> float:
        """sqrt(E|x - mean|^2): dividing by it makes the total variance one."""
        return float(np.sqrt(self.variance.sum()))


@dataclass(frozen=True)
class Quantisation:
    """The loss through int8, measured while writing, over the rows that count."""

    snr_db: float
    """10 log10 of E|x|^2 over the mean squared error."""
    fvu: float
    """Mean squared error over E|x - mean|^2: the amount that int8 adds to a fraction of variance unexplained."""


@dataclass(frozen=True)
class Store:
    """A frozen snapshot of what was committed when the store was opened."""

    files: Files
    spec: StoreSpec
    state: State
    commits: Commits

    @classmethod
    def open(cls, location: str | Path | Files, *, lenient: bool = False) -> "Store":
        """Opens a store. Raises UserError when there is none, DamagedError when its description or manifest is damaged.
        `lenient` opens what is left of a damaged manifest."""
        files = open_files(location) if isinstance(location, str | Path) else location
        return GrowingStore(files).open(lenient=lenient)

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def root(self) -> Path:
        """The folder of a store on a disk. Raises UserError for a remote store."""
        if not isinstance(self.files, LocalFiles):
            raise UserError(f"{self.name}: is not on a disk here")
        return self.files.root

    @property
    def location(self) -> str:
        """A location that names the store from anywhere on this machine."""
        return str(self.root.resolve()) if isinstance(self.files, LocalFiles) else self.files.name

    @property
    def missing(self) -> list[int]:
        """Shards that are planned but not committed."""
        if self.complete:
            return []
        shards: list[int] = np.setdiff1d(np.arange(self.spec.n_shards), self.commits.shards, True).tolist()
        return shards

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        return len(self.commits) == self.spec.n_shards

    @property
    def n_rows(self) -> int:
        return self.commits.n_rows

    @cached_property
    def snapshot_id(self) -> str:
        """An id of this set of committed shards: equal ids mean equal bytes."""
        crc = 0
        for line in self.commits.lines():
            crc = crc32c(line.encode(), crc)
        return f"{crc:08x}-{len(self.commits)}"

    @cached_property
    def spec_id(self) -> str:
        """An id of the store that this will be when it is final."""
        return spec_id(self.spec)

    def only(self, shards: list[int]) -> "Store":
        """The same store with fewer commits."""
        return Store(self.files, self.spec, self.state, self.commits.only(shards))

    def tokens(self) -> NDArray[Any]:
        """Token ids [n_contexts, context], in corpus order, all in memory; use `token_rows` for a large store. Raises
        DamagedError when they are not what was written."""
        dtype = self.token_rows(check=False).layout.dtype
        try:
            ids = np.empty((self.spec.n_contexts, self.spec.context), dtype)
        except MemoryError as error:
            raise UserError(f"{self.name}: its {self.spec.n_tokens:,} token ids do not fit into memory") from error
        at = 0
        for block in self.token_rows(check=False).blocks():
            ids[at : at + len(block)] = block
            at += len(block)
        return ids

    def token_rows(self, *, check: bool = True) -> TokenRows:
        """Token ids that are read from disk on request. With `check`, all of them are read once; raises DamagedError
        when they are not what was written."""
        rows = TokenRows(self.files, self.spec)
        return rows.check() if check else rows

    def statistics(self, hook: str) -> Statistics:
        """Moments of one hookpoint over the committed shards. Raises UserError when too few rows count, DamagedError
        when its sums are not finite."""
        n = self.counted(hook)
        total, squares = (self.total(f"stats/{hook}/{name}") for name in ("sum", "sum_of_squares"))
        with np.errstate(all="ignore"):
            mean = total / n
            square, most = squares / n, mean**2
        if not (np.isfinite(most) & np.isfinite(square)).all():
            raise DamagedError(f"{self.name}/stats/{hook}: its moments are NaN or infinite. {VERIFY}")
        return Statistics(n, mean, np.maximum(square - most, 0.0))

    def counted(self, hook: str) -> int:
        """Rows that the moments are over. Raises UserError when there are fewer than 2."""
        n = self.kept(hook)
        if n < 2:
            raise UserError(f"{self.name}: only {n} rows of {hook} count; at least 2 are needed. Harvest more tokens")
        return n

    def kept(self, hook: str) -> int:
        return self.commits.kept(hook)

    @cached_property
    def totals(self) -> dict[str, NDArray[np.float64]]:
        """Sums that were computed already, by array path."""
        return {}

    def total(self, path: str) -> NDArray[np.float64]:
        """The sum of one per-shard statistic over the committed shards, [d_in]."""
        if path not in self.totals:
            self.totals[path] = self.add_rows(path)
        return self.totals[path]

    def add_rows(self, path: str) -> NDArray[np.float64]:
        """Adds row after row, as numpy adds the rows of one large array, with ROWS_ADDED rows in memory at a time."""
        shards, rows = self.commits.shards.tolist(), list[NDArray[np.float64]]()
        width = self.spec.rows_of_shards()[path][0]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for at in range(0, len(shards), ROWS_ADDED):
                rows += pool.map(lambda shard: self.row_of_shard(path, shard), shards[at : at + ROWS_ADDED])
                if width > 1:  # a single column is added pairwise by numpy
                    rows = [np.sum(rows, axis=0)]
        total: NDArray[np.float64] = np.sum(rows, axis=0)
        return total

    def row_of_shard(self, path: str, shard: int) -> NDArray[Any]:
        """One shard's row of an array with one row per shard, [d_in]."""
        file, (d_in, dtype) = shard_file(path, shard, True), self.row_kinds[path]
        size, crc = self.commits[shard].files[path]
        if size != d_in * dtype.itemsize + 4:
            raise DamagedError(f"{self.name}/{file}: {size} bytes were committed; {d_in} {dtype} are expected")
        payload = without_crc(self.files.open(file, size, crc).read(0, size), f"{self.name}/{file}")
        return np.frombuffer(payload, dtype).copy()

    @cached_property
    def row_kinds(self) -> dict[str, tuple[int, np.dtype[Any]]]:
        """The arrays with one row per shard: path -> (d_in, data type)."""
        return self.spec.rows_of_shards()

    def dim_scale(self, hook: str, shard: int) -> NDArray[np.float32]:
        """The scale of each dimension for int8, [d_in]."""
        return self.row_of_shard(f"scale/{hook}/dim", shard)

    def quantisation(self, hook: str) -> Quantisation | None:
        """The loss through int8; None for a store that is not quantised."""
        if not self.spec.quantised:
            return None
        n, squares = self.counted(hook), self.total(f"stats/{hook}/sum_of_squares").sum()
        error = max(float(self.total(f"stats/{hook}/sum_of_squared_error").sum()), np.finfo("f8").tiny)
        variance = self.statistics(hook).variance.sum()
        ratio = max(float(squares / error), np.finfo("f8").tiny)
        return Quantisation(float(10 * np.log10(ratio)), float(error / n / variance) if variance else 0.0)

    def stored_bytes(self, hook: str) -> int:
        """Bytes of a hookpoint's activations, including the scales that are needed to read them back."""
        paths = [hook, *([f"scale/{hook}/row", f"scale/{hook}/dim"] if self.spec.quantised else [])]
        return sum(self.commits.bytes_of(path) for path in paths)


class GrowingStore:
    """A store that is opened repeatedly while it is written: each time only the new part is read."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.manifest: Manifest | None = None

    def open(self, *, lenient: bool = False) -> Store:
        """The present state of the store: see `Store.open`."""
        spec, state = read_state(self.files)
        if self.manifest is None or self.manifest.spec != spec:
            self.manifest = Manifest(self.files, spec)
        while True:  # a harvest that ends in between moves its commits from the logs to the index
            commits = self.manifest.commits(state == "final", lenient)
            now = read_state(self.files)[1] if state == "writing" else state
            if now == state:
                return Store(self.files, spec, state, commits)
            state = now


def check_metadata_paths(store: Store, metadata: Sizes) -> None:
    """Raises DamagedError unless metadata.json names exactly the files that such a store has beside its shards."""
    expected = {*store.spec.token_files(), *store.spec.documents()}
    strange, lacking = sorted(metadata.keys() - expected), sorted(expected - metadata.keys())
    if strange or lacking:
        what = f"names {quoted(strange[0])}, which is" if strange else f"does not name {lacking[0]}, which is"
        raise DamagedError(f"{store.name}/{METADATA}: {what} {'no' if strange else 'a'} file of this store")


def find_hookpoint(location: str | Path, hook: str | None) -> tuple[Store, str]:
    """The store and the hookpoint that `--store PATH [--hook NAME]` means: PATH is a store, or an array in one."""
    place = str(location).rstrip("/") if is_remote(location) else os.path.normpath(location)
    root, inside = place, "."
    above: str | None = place
    for depth in range(4):
        if above is None:
            break
        if is_store(open_files(above)):
            root, inside = above, "/".join(place.split("/")[-depth:]) if depth else "."
            break
        above = parent_of(above)
    store = Store.open(root)
    names = list(store.spec.hookpoints)
    wanted = hook if inside == "." else inside
    if inside != "." and hook not in (None, inside, inside.split("/")[-1]):
        raise UserError(f"--hook {hook}: --store {location} already says {inside}. Give one of the two")
    matches = [
        n for n in names if wanted is None or n == wanted or n.split("/")[-1] == wanted or n.startswith(f"{wanted}/")
    ]
    if len(matches) == 1:
        return store, matches[0]
    if not matches:
        raise UserError(f"{store.name}: has no hookpoint {wanted!r}. It has: {', '.join(names)}. Give one with --hook")
    raise UserError(f"{store.name}: holds several hookpoints. Say which one with --hook: {', '.join(matches)}")


def is_store(files: Files) -> bool:
    """Whether a harvest was begun here. Raises DamagedError when a zarr.json exists but cannot be read, because a store
    that cannot be reached for a moment must not be taken for an empty folder."""
    try:
        document = parse_json(files.read(STATE_FILE))
    except FileNotFoundError:
        return False
    except (OSError, BadData) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise error_kind(error)(f"{files.name}: {in_words(error)}") from error
        raise DamagedError(f"{files.name}/{STATE_FILE}: cannot be read ({error}). Restore it from a copy") from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    ours = attributes.get("sagsae") if isinstance(attributes, dict) else None
    return isinstance(ours, dict) and "state" in ours
