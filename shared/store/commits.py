"""Commits in columns: the content of a manifest in a few hundred bytes per shard, and its conversion from and to lines.

A store may have 100,000 shards of fourteen files each. As objects they would take kilobytes and microseconds each; as
arrays they are read, checked and summed all at once. A Commit object is only made on request. Every line is checked
against the store's spec before any of it is used.
"""

import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError
from shared.gate import BadData, integer, members, parse_json
from shared.store.shard import crc32c
from shared.store.spec import StoreSpec

MANIFEST_VERSION: Final = 1
LINE_BYTES: Final = 1 << 20
"""Largest line in bytes. Ours have about a hundred per file."""
AT_A_TIME: Final = 4096
"""Lines whose numbers are parsed at once."""
LARGEST: Final = 10**18 - 1
MADE: Final = 1024
"""Commit objects that are kept once they were made."""
SHARD, ROWS, START, STOP, KEPT = range(5)
"""Columns of `CommitColumns.numbers`."""
NUMBERS: Final = 5
ABSENT: Final = -1
"""Value in the columns of `nonfinite` where the line does not name the hookpoint."""
CHECKSUM: Final = rb',"c":'

Sizes = dict[str, tuple[int, int]]
"""Length and crc32 of whole files, by path."""


@dataclass(frozen=True)
class Commit:
    """One manifest line: a shard that exists, and the length and crc32 of each of its files."""

    shard: int
    rows: int
    start: int
    stop: int
    kept: int
    """Rows that count in the statistics: not position 0, not a special token."""
    files: Mapping[str, tuple[int, int]]
    """Length and crc32 of each file, by array."""
    nonfinite: dict[str, int] = field(default_factory=dict)
    """Number of kept rows with a NaN or an infinity, which the moments leave out, for each hookpoint that has any such
    row, kept or not."""

    def line(self) -> str:
        body = {
            "v": MANIFEST_VERSION,
            "k": self.shard,
            "rows": self.rows,
            "in": [self.start, self.stop],
            "kept": self.kept,
            "files": as_json(self.files),
        }
        return sealed({**body, "nonfinite": dict(sorted(self.nonfinite.items()))} if self.nonfinite else body)


def as_json(files: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {path: {"bytes": n, "crc32": crc} for path, (n, crc) in sorted(files.items())}


def sealed(body: dict[str, Any]) -> str:
    """A line of JSON whose last member is the crc32c of the line without it."""
    return with_seal(json.dumps(body, separators=(",", ":")))


def with_seal(text: str) -> str:
    return f'{text[:-1]},"c":{crc32c(text.encode())}}}\n'


def under_seal(line: bytes) -> bytes | None:
    """The JSON of a sealed line; None when the line is torn or altered."""
    text, found, crc = line.rpartition(CHECKSUM)
    return text + b"}" if found and crc == b"%d}\n" % crc32c(text + b"}") else None


def unsealed(line: str | bytes) -> dict[str, Any] | None:
    """The body of a sealed line; None when the line is torn or altered. Raises BadData when the sealed text is no JSON
    that we write."""
    text = under_seal(line.encode(errors="replace") if isinstance(line, str) else line)
    return None if text is None else members(parse_json(text), (), None)


class FileSizes(Mapping[str, tuple[int, int]]):
    """The files of one commit, as a view of the columns."""

    def __init__(self, columns: "CommitColumns", row: int) -> None:
        self.columns, self.row = columns, row

    def __getitem__(self, array: str) -> tuple[int, int]:
        place = self.columns.places[array]
        return int(self.columns.sizes[self.row, place]), int(self.columns.crcs[self.row, place])

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns.arrays)

    def __len__(self) -> int:
        return len(self.columns.arrays)

    def __contains__(self, array: object) -> bool:
        return array in self.columns.places

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass(frozen=True, eq=False)
class CommitColumns(Sequence[Commit]):
    """n commits in the order in which they were read, with A arrays and H hookpoints."""

    arrays: tuple[str, ...]
    """Array names, sorted."""
    hooks: tuple[str, ...]
    numbers: NDArray[np.int64]
    """[n, 5]: shard, rows, start, stop, kept."""
    sizes: NDArray[np.int64]
    """[n, A] bytes."""
    crcs: NDArray[np.uint32]
    """[n, A] crc32."""
    nonfinite: NDArray[np.int64] | None = None
    """[n, H], ABSENT where a line does not name the hookpoint; None where no line names any."""

    @classmethod
    def empty(cls, spec: StoreSpec) -> "CommitColumns":
        arrays, hooks = tuple(sorted(spec.arrays())), tuple(sorted(spec.hookpoints))
        return cls(arrays, hooks, np.empty((0, NUMBERS), np.int64), *no_files(len(arrays)))

    @classmethod
    def from_commits(cls, commits: Sequence[Commit], arrays: Iterable[str], hooks: Iterable[str]) -> "CommitColumns":
        """Makes columns of commits that all have a file in each of these arrays."""
        arrays, hooks = tuple(sorted(arrays)), tuple(sorted(hooks))
        numbers = [(c.shard, c.rows, c.start, c.stop, c.kept) for c in commits]
        files = np.array([[c.files[array] for array in arrays] for c in commits], np.int64)
        files = files.reshape(len(commits), len(arrays), 2)
        counts = [[c.nonfinite.get(hook, ABSENT) for hook in hooks] for c in commits]
        marked = np.array(counts, np.int64) if any(c.nonfinite for c in commits) else None
        rows = np.array(numbers, np.int64).reshape(-1, NUMBERS)
        return cls(arrays, hooks, rows, files[:, :, 0].copy(), files[:, :, 1].astype(np.uint32), marked)

    @cached_property
    def places(self) -> dict[str, int]:
        return {array: place for place, array in enumerate(self.arrays)}

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, row: int) -> Commit: ...

    @overload
    def __getitem__(self, row: slice) -> list[Commit]: ...

    def __getitem__(self, row: int | slice) -> Commit | list[Commit]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        shard, rows, start, stop, kept = self.numbers[row].tolist()
        return Commit(shard, rows, start, stop, kept, FileSizes(self, row), self.named(row))

    def named(self, row: int) -> dict[str, int]:
        if self.nonfinite is None:
            return {}
        counts = zip(self.hooks, self.nonfinite[row].tolist(), strict=True)
        return {hook: count for hook, count in counts if count != ABSENT}

    def take(self, rows: NDArray[np.int64]) -> "CommitColumns":
        marked = None if self.nonfinite is None else self.nonfinite[rows]
        return CommitColumns(self.arrays, self.hooks, self.numbers[rows], self.sizes[rows], self.crcs[rows], marked)

    def lines(self) -> Iterator[str]:
        """The manifest line of each commit, as `Commit.line` writes it."""
        body = template(self.arrays, "%d")
        for row in range(len(self)):
            if self.named(row):
                yield self[row].line()
                continue
            files = np.stack([self.sizes[row], self.crcs[row]], axis=1)
            yield with_seal(body % (*self.numbers[row].tolist(), *files.reshape(-1).tolist()))


def no_files(arrays: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    return np.empty((0, arrays), np.int64), np.empty((0, arrays), np.uint32)


def concatenate_columns(parts: Sequence[CommitColumns]) -> CommitColumns:
    """Concatenates columns; there must be at least one."""
    if len(parts) == 1:
        return parts[0]
    first, marked = parts[0], None
    if any(part.nonfinite is not None for part in parts):
        absent = [np.full((len(part), len(first.hooks)), ABSENT, np.int64) for part in parts]
        marked = np.concatenate(
            [none if part.nonfinite is None else part.nonfinite for part, none in zip(parts, absent, strict=True)]
        )
    numbers, sizes, crcs = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("numbers", "sizes", "crcs")
    )
    return CommitColumns(first.arrays, first.hooks, numbers, sizes, crcs, marked)


class Commits(Mapping[int, Commit]):
    """The commits of a store by shard, in order. If a shard is committed twice, the last commit counts."""

    def __init__(self, columns: CommitColumns) -> None:
        shards = columns.numbers[:, SHARD]
        if len(shards) > 1 and not (np.diff(shards) > 0).all():
            order = np.argsort(shards, kind="stable")
            last = np.append(np.diff(shards[order]) > 0, True)
            columns = columns.take(order[last])
        self.columns = columns
        self.made: dict[int, Commit] = {}
        """Some commit objects: reading one chunk requests its shard's commit several times."""

    @classmethod
    def from_mapping(cls, commits: Mapping[int, Commit]) -> "Commits":
        if isinstance(commits, Commits):
            return commits
        found = list(commits.values())
        arrays = set(found[0].files) if found else set[str]()
        return cls(CommitColumns.from_commits(found, arrays, {hook for commit in found for hook in commit.nonfinite}))

    @cached_property
    def shards(self) -> NDArray[np.int64]:
        """[n] shard numbers, sorted."""
        return self.columns.numbers[:, SHARD].copy()

    @property
    def rows(self) -> NDArray[np.int64]:
        """[n] rows of each shard."""
        return self.columns.numbers[:, ROWS]

    @cached_property
    def n_rows(self) -> int:
        return int(self.rows.sum())

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return int(self.columns.sizes.sum())

    def bytes_of(self, array: str) -> int:
        """Bytes of the files in one array."""
        return int(self.columns.sizes[:, self.columns.places[array]].sum()) if len(self) else 0

    def kept(self, hook: str) -> int:
        """Rows that the moments of a hookpoint are over."""
        total = int(self.columns.numbers[:, KEPT].sum())
        if self.columns.nonfinite is None or hook not in self.columns.hooks:
            return total
        counts = self.columns.nonfinite[:, self.columns.hooks.index(hook)]
        return total - int(counts[counts != ABSENT].sum())

    def row(self, shard: object) -> int | None:
        """The place of a shard in the columns; None when it is not committed."""
        try:
            number = operator.index(shard)  # type: ignore[arg-type]
        except TypeError:
            return None
        if 0 <= number < len(self) and self.shards[number] == number:  # the common case: no shard before it is missing
            return number
        row = int(np.searchsorted(self.shards, number))
        return row if row < len(self) and self.shards[row] == number else None

    def __getitem__(self, shard: int) -> Commit:
        found = self.made.get(shard)
        if found is None:
            row = self.row(shard)
            if row is None:
                raise KeyError(shard)
            if len(self.made) >= MADE:
                self.made.clear()
            found = self.made[int(shard)] = self.columns[row]
        return found

    def __contains__(self, shard: object) -> bool:
        return self.row(shard) is not None

    def __iter__(self) -> Iterator[int]:
        return iter(self.shards.tolist())

    def __len__(self) -> int:
        return len(self.columns)

    def __eq__(self, other: object) -> bool:
        return Mapping.__eq__(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Commits of {len(self):,} shards"

    def only(self, shards: Iterable[int]) -> "Commits":
        """The commits of some shards. Raises KeyError for a shard that is not committed."""
        wanted = np.fromiter(shards, np.int64)
        rows = np.minimum(np.searchsorted(self.shards, wanted), max(0, len(self) - 1))
        if len(wanted) and (not len(self) or (lacking := self.shards[rows] != wanted).any()):
            raise KeyError(int(wanted[lacking][0]) if len(self) else int(wanted[0]))
        return Commits(self.columns.take(rows))

    def fresh(self, before: "Commits | NDArray[np.int64]") -> NDArray[np.int64]:
        """Shards that are committed here and not in `before`, sorted."""
        return np.setdiff1d(self.shards, before.shards if isinstance(before, Commits) else before, assume_unique=True)

    def lines(self) -> Iterator[str]:
        return self.columns.lines()


# From lines


@dataclass(frozen=True)
class ParsedLines:
    """The parsed lines of a log."""

    commits: CommitColumns
    bad: dict[int, str]
    """Lines that are no commits of this store: line number from 1, and what is wrong."""
    lines: int
    torn: bool
    """Whether the last line is unterminated or altered: still being written, or torn by a crash."""
    whole: int
    """Bytes before that line."""


def template(arrays: Sequence[str], number: str) -> str:
    """A line without its checksum, as the writer makes it where no row has a NaN, with `number` for every number."""
    files = ",".join(f'{json.dumps(array)}:{{"bytes":{number},"crc32":{number}}}' for array in arrays)
    head = f'{{"v":{MANIFEST_VERSION},"k":{number},"rows":{number},"in":[{number},{number}],"kept":{number}'
    return f'{head},"files":{{{files}}}}}'


def pattern(arrays: Sequence[str]) -> re.Pattern[bytes]:
    """Matches a whole line as the writer makes it. Groups: the text under the checksum, every number in it, the
    checksum."""
    text = re.escape(template(arrays, "\0")).replace(re.escape("\0"), "(0|[1-9][0-9]{0,17})")
    under = text[: -len(re.escape("}"))]
    return re.compile((f"({under})" + r",\"c\":([0-9]{1,10})\}\n").encode())


def parse_lines(data: bytes, spec: StoreSpec, before: int = 0) -> ParsedLines:
    """Parses the lines of a log, after `before` others. Lines in the writer's exact form are matched as a whole, others
    are parsed as JSON; all are checked against the spec. Raises UserError for a newer version."""
    empty, read = CommitColumns.empty(spec), CommitParser(spec)
    match, at, number, torn, whole = pattern(empty.arrays).match, 0, before, False, len(data)
    while at < len(data):
        number += 1
        found = match(data, at)
        if found and crc32c(found[1] + b"}") == int(found[found.re.groups]):
            read.add(number, found.groups()[1:-1])
            at = found.end()
            continue
        end = data.find(b"\n", at) + 1 or len(data)
        text = under_seal(data[at:end])
        torn, whole = text is None and end == len(data), at if text is None else whole
        read.add_json(number, text)
        at = end
    commits, bad = read.result(empty)
    return ParsedLines(commits, bad, number, torn, whole if torn else len(data))


class CommitParser:
    """Collects lines and makes columns of them."""

    def __init__(self, spec: StoreSpec) -> None:
        self.spec, self.arrays, self.hooks = spec, tuple(sorted(spec.arrays())), tuple(sorted(spec.hookpoints))
        self.waiting: list[bytes] = []
        self.blocks: list[NDArray[np.int64]] = []
        self.numbers: list[int] = []
        self.bad: dict[int, str] = {}
        self.nonfinite: dict[int, list[int]] = {}
        """Non-finite counts, by place among the parsed lines."""

    def add(self, number: int, values: tuple[bytes, ...]) -> None:
        self.numbers.append(number)
        self.waiting.append(b" ".join(values))
        if len(self.waiting) == AT_A_TIME:
            self.flush()

    def add_json(self, number: int, text: bytes | None) -> None:
        try:
            if text is None:
                raise BadData("is torn or altered")
            values, nonfinite = values_of(members(parse_json(text, LINE_BYTES), (), None), self.arrays, self.hooks)
        except BadData as error:
            self.bad[number] = str(error)
            return
        if nonfinite is not None:
            self.nonfinite[len(self.numbers)] = nonfinite
        self.add(number, tuple(b"%d" % value for value in values))

    def flush(self) -> None:
        if self.waiting:
            found = np.fromstring(b" ".join(self.waiting).decode(), np.int64, sep=" ")
            self.blocks.append(found.reshape(len(self.waiting), NUMBERS + 2 * len(self.arrays)))
            self.waiting = []

    def result(self, empty: CommitColumns) -> tuple[CommitColumns, dict[int, str]]:
        """The commits, and all bad lines in order."""
        self.flush()
        if not self.numbers:
            return empty, self.bad
        values = np.concatenate(self.blocks)
        self.blocks = []
        marked = None
        if self.nonfinite:
            marked = np.full((len(values), len(self.hooks)), ABSENT, np.int64)
            marked[list(self.nonfinite)] = list(self.nonfinite.values())
        right = of_this_store(values, marked, self.spec, self.arrays)
        files = values[:, NUMBERS:].reshape(len(values), -1, 2)
        kept = np.flatnonzero(right)
        for row in np.flatnonzero(~right).tolist():
            self.bad[self.numbers[row]] = what_is_wrong(values[row, :NUMBERS].tolist(), self.spec)
        bad = dict(sorted(self.bad.items()))
        numbers, sizes = values[kept, :NUMBERS], files[kept, :, 0]
        crcs = files[kept, :, 1].astype(np.uint32)
        return CommitColumns(
            self.arrays, self.hooks, numbers, sizes, crcs, None if marked is None else marked[kept]
        ), bad


def values_of(body: dict[str, Any], arrays: tuple[str, ...], hooks: tuple[str, ...]) -> tuple[list[int], Any]:
    """All numbers of a line in the order of its template, and those of `nonfinite` by hookpoint (None without it).
    Raises BadData, UserError for a newer version."""
    check_version(body)
    members(body, ("v", "k", "rows", "in", "kept", "files"), None)
    span = body["in"]
    if not isinstance(span, list) or len(span) != 2:
        raise BadData("in: expected two numbers")
    values = [integer(value, "a number", 0, LARGEST) for value in (body["k"], body["rows"], *span, body["kept"])]
    files = members(body["files"], arrays)
    for array in arrays:
        entry = members(files[array], ("bytes", "crc32"))
        values += [integer(entry[name], name, 0, LARGEST) for name in ("bytes", "crc32")]
    if "nonfinite" not in body:
        return values, None
    counts = members(body["nonfinite"], (), hooks)
    return values, [integer(counts[hook], hook, 0, LARGEST) if hook in counts else ABSENT for hook in hooks]


def check_version(body: dict[str, Any]) -> None:
    """Raises UserError for a newer manifest, BadData where the version is missing."""
    version = integer(body.get("v"), "v", 1, LARGEST)
    if version > MANIFEST_VERSION:
        raise UserError(
            f"the manifest is in version {version}, this sagsae reads version {MANIFEST_VERSION}. Install a newer one"
        )


def of_this_store(
    values: NDArray[np.int64], marked: NDArray[np.int64] | None, spec: StoreSpec, arrays: tuple[str, ...]
) -> NDArray[np.bool_]:
    """[n] which lines can be commits of a store with this spec: the shard exists and has these rows, no more of them
    count than there are, and its files are no larger than such files can be."""
    shard, rows, start, stop, kept = values[:, :NUMBERS].T
    there = (shard >= 0) & (shard < spec.n_shards)
    expected = np.where(there, shard, 0) * spec.shard_rows
    right: NDArray[np.bool_] = (
        there & (start == expected) & (stop == np.minimum(expected + spec.shard_rows, spec.n_tokens))
    )
    right &= (rows == stop - start) & (kept >= 0) & (kept <= rows)
    low, high = size_bounds(spec, arrays)
    files = values[:, NUMBERS:].reshape(len(values), -1, 2)
    right &= ((files[:, :, 0] >= low) & (files[:, :, 0] <= high)).all(axis=1)
    right &= ((files[:, :, 1] >= 0) & (files[:, :, 1] < 1 << 32)).all(axis=1)
    return right if marked is None else right & (marked <= kept[:, None]).all(axis=1)


def what_is_wrong(numbers: list[int], spec: StoreSpec) -> str:
    """Describes why a line cannot belong to this store."""
    shard, rows, start, stop, kept = numbers
    if not 0 <= shard < spec.n_shards:
        return f"shard {shard:,} is committed, but the store has {spec.n_shards:,} shards"
    if (start, stop) != spec.shard_range(shard) or rows != stop - start:
        return f"shard {shard:,} is committed for other rows than it has"
    if kept > rows:
        return f"shard {shard:,} counts {kept:,} of its {rows:,} rows"
    return f"shard {shard:,} has files, or rows with NaN, that it cannot have"


def size_bounds(spec: StoreSpec, arrays: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The smallest and largest number of bytes of a shard's file, for each of these arrays. Arrays with one row per
    shard have one length; compressed data may be somewhat larger than its rows."""
    low, high, layouts, rows = [], [], spec.layouts(), spec.rows_of_shards()
    for array in arrays:
        if array in rows:
            d_in, dtype = rows[array]
            low.append(d_in * dtype.itemsize + 4)
            high.append(low[-1])
        else:
            layout = layouts[array]
            raw = int(np.prod(layout.row_shape, dtype=object)) * layout.dtype.itemsize * layout.shard_rows
            low.append(0)
            high.append(4 * raw + 64 * layout.chunks_per_shard + 65_536)
    return np.array([min(n, LARGEST) for n in low], np.int64), np.array([min(n, LARGEST) for n in high], np.int64)


def parse_commit(line: str) -> Commit | None:
    """The commit in a manifest line of any store; None when the line is torn or altered, or no commit."""
    try:
        body = unsealed(line)
        if body is None:
            return None
        arrays = members(body.get("files"), (), None)
        hooks = tuple(members(body.get("nonfinite", {}), (), None))
        values, counts = values_of(body, tuple(arrays), hooks)
    except BadData:
        return None
    pairs = zip(values[NUMBERS::2], values[NUMBERS + 1 :: 2], strict=True)
    nonfinite = {} if counts is None else dict(zip(hooks, counts, strict=True))
    shard, rows, start, stop, kept = values[:NUMBERS]
    return Commit(shard, rows, start, stop, kept, dict(zip(arrays, pairs, strict=True)), nonfinite)
