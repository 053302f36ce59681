"""Compares what a store says twice: rows with their norms and sums, int8's scales with its rows, and both with the
commit.

Sums are first computed in float32, which costs a fraction of decoding. Where they differ by more than a few parts in a
million they are computed again in float64, as the writer did, and only a remaining difference is damage. With int8 the
original rows of the moments are gone; there the stored error bounds how far a moment may be from the decoded rows.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.files.base import OpenFile
from shared.permute import SHARD_ROWS, permutation
from shared.store.opened import Store
from shared.store.quantise import LEVELS, dim_scale
from shared.store.reader import ArrayReader, Reader, read_index, read_shard
from shared.store.shard import as_float32, crc32, decoded_chunk, file_crc
from shared.store.spec import rows_that_count, shard_file
from shared.store.tokens import TokenRows

FAST: Final = (2e-6, 2e-8)
"""Relative differences that need no second look, for float32 sums: of squares, and of values (relative to the sum of
absolute values)."""
EXACT: Final = (1e-9, 1e-12)
"""The same tolerances for float64 sums, in another order than the writer's."""
ROUNDED: Final = 2.0**-23
"""Relative rounding of a norm, which is stored as float32."""
HALF_A_STEP: Final = 0.5001
"""Largest error of int8, in steps of row * dim."""
AT_ONCE: Final = 256
"""Rows that are summed in float32 before float64 takes over."""
CACHED: Final = 1 << 18
"""Numbers that are processed at a time: 1 MB of float32, about a core's cache."""

Floats = NDArray[np.float64]
Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class RowSums:
    """Sums over the rows of one hookpoint in one shard."""

    norms: Floats
    """[n] norm of every row."""
    total: Floats
    """[d_in] sum over the rows that count."""
    squares: Floats
    """[d_in] sum of squares over the rows that count."""


@dataclass(frozen=True)
class Recount:
    """Compares the values of a store shard by shard, from any number of threads."""

    store: Store
    readers: dict[str, Reader]
    """Readers of the arrays that can be read."""
    tokens: TokenRows | None
    """[n_contexts, context]; None when they are damaged."""

    def differences(self, shard: int, broken: set[str]) -> list[str]:
        """One line for every file of the shard that does not decode, or contradicts another. `broken` are the arrays
        whose files are known to be damaged."""
        commit = self.store.commits[shard]
        order = permutation(commit.rows, self.store.spec.seed, SHARD_ROWS, shard)
        lines: list[str] = []
        found = self.decoded(shard, broken, lines)
        stream = commit.start + order
        for name, right in zip(("context", "position"), np.divmod(stream, self.store.spec.context), strict=True):
            if f"index/{name}" in found:
                lines += self.unequal(f"index/{name}", shard, name, found[f"index/{name}"], right)
        kept = self.kept(shard, order)
        if kept is not None and int(kept.sum()) != commit.kept:
            lines.append(
                f"{self.store.name}/manifest: shard {shard} counts {commit.kept} rows, its tokens give {kept.sum()}"
            )
        for hook in self.store.spec.hookpoints:
            if hook not in self.readers or hook in broken:
                continue
            try:
                lines += HookpointRecount(self, hook, shard).differences(found, kept, broken)
            except DamagedError as error:
                lines.append(str(error))
        return lines

    def arrays_checked_here(self) -> set[str]:
        """Arrays whose checksums are checked here together with their values, so that their files are read once."""
        return {array for array, reader in self.readers.items() if reader.layout.row_shape and is_ours(reader)}

    def decoded(self, shard: int, broken: set[str], lines: list[str]) -> dict[str, NDArray[Any]]:
        """All arrays of a shard with one number per row, by name. An array that does not decode adds a line to
        `lines`."""
        found = {}
        for array, reader in self.readers.items():
            if array in broken or reader.layout.row_shape:
                continue
            try:
                found[array] = read_shard(reader, shard)
            except DamagedError as error:
                lines.append(str(error))
        return found

    def file(self, array: str, shard: int) -> str:
        return f"{self.store.name}/{shard_file(array, shard, array not in self.readers or is_matrix(self, array))}"

    def unequal(self, array: str, shard: int, name: str, found: NDArray[Any], right: NDArray[Any]) -> list[str]:
        wrong = np.flatnonzero(found != right)
        if not wrong.size:
            return []
        at = int(wrong[0])
        return [f"{self.file(array, shard)}: row {at} has {name} {found[at]} instead of {right[at]}"]

    def kept(self, shard: int, order: NDArray[np.int64]) -> Marks | None:
        """[n] which rows of a shard count, in stored order."""
        if self.tokens is None:
            return None
        spec, (start, stop) = self.store.spec, self.store.spec.shard_range(shard)
        first, last = start // spec.context, -(-stop // spec.context)
        keep = rows_that_count(self.tokens[first:last], spec).reshape(-1)
        found: Marks = keep[start - first * spec.context :][order]
        return found


def is_ours(reader: Reader) -> bool:
    return isinstance(reader, ArrayReader)


def is_matrix(recount: Recount, array: str) -> bool:
    return bool(recount.readers[array].layout.row_shape)


@dataclass(frozen=True)
class HookpointRecount:
    """Compares one hookpoint in one shard."""

    recount: Recount
    hook: str
    shard: int

    def differences(self, found: dict[str, NDArray[Any]], kept: Marks | None, broken: set[str]) -> list[str]:
        """`found` are the shard's arrays that decode. Raises DamagedError where the rows or the sums do not decode."""
        store, norm, scale = self.recount.store, f"stats/{self.hook}/norm", f"scale/{self.hook}/row"
        sums_there = not any(path in broken for path in store.row_kinds if f"/{self.hook}/" in path)
        if kept is None or norm not in found or not sums_there or (store.spec.quantised and scale not in found):
            for _ in chunks(self.reader, self.shard):  # nothing to compare with, but the chunks must decode
                pass
            return []
        norms = found[norm]
        lines = self.wrong_count(norms, kept)
        counted = kept & np.isfinite(norms)
        if store.spec.quantised:
            return lines + self.wrong_quantised(norms, kept, counted, found[scale])
        return lines + self.wrong_moments(norms, counted)

    @property
    def reader(self) -> Reader:
        return self.recount.readers[self.hook]

    def file(self, array: str) -> str:
        return self.recount.file(array, self.shard)

    def sum_of_shard(self, name: str) -> NDArray[Any]:
        return self.recount.store.row_of_shard(f"stats/{self.hook}/{name}", self.shard)

    def wrong_count(self, norms: NDArray[np.float32], kept: Marks) -> list[str]:
        """Compares the number of rows with a NaN or an infinity with the commit."""
        bad = ~np.isfinite(norms)
        found = int((bad & kept).sum()) if bad.any() else None
        said = self.recount.store.commits[self.shard].nonfinite.get(self.hook)
        if found == said:
            return []
        names = ["none" if count is None else f"some, {count} of which would count" for count in (found, said)]
        norms_file = self.file(f"stats/{self.hook}/norm")
        return [f"{norms_file}: rows with NaN or infinities: {names[0]}; the manifest says {names[1]}"]

    def wrong_moments(self, norms: NDArray[np.float32], counted: Marks) -> list[str]:
        """Compares the moments of rows that were stored without loss."""
        stored = self.sum_of_shard("sum"), self.sum_of_shard("sum_of_squares")
        rows = as_numbers(self.reader, self.shard, self.recount.store.spec.dtype, np.float32)
        lines = self.unequal(row_sums(rows, counted), norms, *stored, counted, FAST)
        if lines:
            rows = as_numbers(self.reader, self.shard, self.recount.store.spec.dtype, np.float64)
            lines = self.unequal(row_sums(rows, counted), norms, *stored, counted, EXACT)
        return lines

    def unequal(
        self,
        found: RowSums,
        norms: NDArray[np.float32],
        total: Floats,
        squares: Floats,
        counted: Marks,
        tolerance: tuple[float, float],
    ) -> list[str]:
        with np.errstate(all="ignore"):
            reach = np.sqrt(max(1, int(counted.sum())) * found.squares)  # at least the sum of absolute values
            right = np.abs(found.total - total) <= tolerance[1] * reach
            right_squares = np.abs(found.squares - squares) <= tolerance[0] * found.squares
        return [
            *self.wrong_norms(norms, found.norms, max(tolerance[0], ROUNDED) * found.norms),
            *self.wrong_dimension("sum", total, found.total, right),
            *self.wrong_dimension("sum_of_squares", squares, found.squares, right_squares),
        ]

    def wrong_norms(self, norms: NDArray[np.float32], found: Floats, distance: Floats) -> list[str]:
        with np.errstate(all="ignore"):
            finite = np.isfinite(norms)
            same = finite == np.isfinite(found.astype("f4"))
            right = same & (~finite | (np.abs(found - norms) <= distance + SUBNORMAL))
        if right.all():
            return []
        at = int(np.flatnonzero(~right)[0])
        return [
            f"{self.file(f'stats/{self.hook}/norm')}: row {at} has norm {norms[at]:.9g}, the activations in "
            f"{self.file(self.hook)} have {found[at]:.9g}"
        ]

    def wrong_dimension(self, name: str, said: NDArray[Any], found: NDArray[Any], right: Marks) -> list[str]:
        if right.all():
            return []
        at = int(np.flatnonzero(~right)[0])
        array = name if "/" in name else f"stats/{self.hook}/{name}"
        return [f"{self.file(array)}: dimension {at} has {said[at]:.17g}, the rows give {found[at]:.17g}"]

    def wrong_quantised(
        self, norms: NDArray[np.float32], kept: Marks, counted: Marks, scales: NDArray[np.float32]
    ) -> list[str]:
        """For int8: compares the scales with those that moments and rows demand, and the moments with the decoded rows,
        within the stored error."""
        store, quantised = self.recount.store, f"scale/{self.hook}"
        total, squares, error = (self.sum_of_shard(n) for n in ("sum", "sum_of_squares", "sum_of_squared_error"))
        dim = store.dim_scale(self.hook, self.shard)
        with np.errstate(all="ignore"):
            right = dim_scale(squares, int(kept.sum()))
            lines = self.wrong_dimension(f"{quantised}/dim", dim, right, np.abs(dim - right) <= ROUNDED * right)
            if lines or not (np.isfinite(dim) & (dim > 0)).all():
                return lines or [f"{self.file(f'{quantised}/dim')}: has scales that are not above zero"]
            found, levels = sums_of_levels(blocks(self.reader, self.shard), scales, dim, counted)
            lines = self.wrong_levels(scales, levels, counted)
            if lines:
                return lines
            wide = dim.astype("f8")
            most = HALF_A_STEP * wide * np.sqrt(np.square(scales[counted].astype("f8")).sum())
            slack = 1e-5 * np.sqrt(found.squares) + np.sqrt(SUBNORMAL)
            off = np.sqrt(error) + slack
            lines += self.wrong_dimension(
                "sum_of_squared_error", error, most**2, (error >= 0) & (off <= most + 2 * slack)
            )
            lines += self.wrong_dimension(
                "sum_of_squares", squares, found.squares, np.abs(np.sqrt(squares) - np.sqrt(found.squares)) <= off
            )
            near = np.abs(total - found.total) <= np.sqrt(max(1, int(counted.sum()))) * off
            lines += self.wrong_dimension("sum", total, found.total, near)
            whole = np.square(norms[counted].astype("f8")).sum()
            if not abs(whole - squares.sum()) <= 1e-6 * whole + SUBNORMAL:
                lines.append(
                    f"{self.file(f'stats/{self.hook}/norm')}: the squares of its norms sum to {whole:.17g}, those of "
                    f"the dimensions in stats/{self.hook}/sum_of_squares to {squares.sum():.17g}"
                )
            lost = ~np.isfinite(scales)
            reach = HALF_A_STEP * np.where(lost, 0, scales) * np.sqrt(np.square(wide).sum()) + 1e-5 * found.norms
            return lines + self.wrong_norms(np.where(lost, 0, norms), np.where(lost, 0, found.norms), reach)

    def wrong_levels(self, scales: NDArray[np.float32], levels: NDArray[np.int16], counted: Marks) -> list[str]:
        """Checks that the largest level of a row is 127, unless all are zero."""
        right = np.where(
            np.isfinite(scales),
            (scales > 0)
            & ((levels == LEVELS) | ((levels == 0) & (scales == 1)) | (scales < 1e-37))
            & (levels <= LEVELS),
            np.isnan(scales) & (levels == 0) & ~counted,
        )
        if right.all():
            return []
        at = int(np.flatnonzero(~right)[0])
        return [
            f"{self.file(f'scale/{self.hook}/row')}: row {at} has scale {scales[at]:.9g}, and its largest level in "
            f"{self.file(self.hook)} is {levels[at]}: they do not belong together"
        ]


SUBNORMAL: Final = float(np.finfo("f4").smallest_subnormal)


def chunks(reader: Reader, shard: int) -> Iterator[NDArray[Any]]:
    """The chunks of a shard, each valid until the next. Raises DamagedError, at the end when only the checksum of the
    whole file is wrong."""
    memory = np.empty(reader.layout.chunk_shape, reader.layout.dtype)
    if not isinstance(reader, ArrayReader):
        for number in range(-(-reader.store.commits[shard].rows // reader.layout.chunk_rows)):
            yield reader.read(shard, number, memory)
        return
    size, crc = reader.store.commits[shard].files[reader.array]
    what = f"{reader.store.name}/{reader.path(shard)}"
    file = reader.store.files.open(reader.path(shard), size)
    try:
        found = yield from decoded(reader, shard, file, size, memory, what)
    except DamagedError as error:
        if file_crc(file, size) != crc:
            raise DamagedError(f"{what}: its checksum is not the committed one") from error
        raise
    if found != crc:
        raise DamagedError(f"{what}: its checksum is not the committed one")


def decoded(
    reader: ArrayReader, shard: int, file: OpenFile, size: int, memory: NDArray[Any], what: str
) -> Generator[NDArray[Any], None, int]:
    """The chunks of a shard's file, which is read once, in order; returns the crc32 of all its bytes."""
    layout, rows, crc = reader.layout, reader.store.commits[shard].rows, 0
    end = size - layout.index_bytes
    if end < 0:
        raise DamagedError(f"{what}: {size} bytes were committed, too few for a shard")
    index = read_index(file, size, layout, rows, what)
    for number, (offset, length) in enumerate(index[: -(-rows // layout.chunk_rows)].tolist()):
        data = file.read(offset, length)
        crc = crc32(data, crc)
        found = decoded_chunk(data, layout, memory, f"{what}: chunk {number}")
        yield found[: min(layout.chunk_rows, rows - number * layout.chunk_rows)]
    return crc32(file.read(end, layout.index_bytes), crc)


def blocks(reader: Reader, shard: int) -> Iterator[NDArray[Any]]:
    """The rows of a shard in blocks small enough for a core's cache. They are powers of two, as chunks mostly are: then
    none is left over."""
    at_once = 1 << (CACHED // reader.layout.row_shape[0] | 1).bit_length() - 1
    for rows in chunks(reader, shard):
        for at in range(0, len(rows), at_once):
            yield rows[at : at + at_once]


def as_numbers(reader: Reader, shard: int, dtype: str, kind: type[Any]) -> Iterator[NDArray[Any]]:
    """Stored rows as numbers of a type, in memory that the caller may overwrite."""
    memory = np.empty(0, kind)
    for rows in blocks(reader, shard):
        if memory.size < rows.size:
            memory = np.empty(rows.size, kind)
        x = memory[: rows.size].reshape(rows.shape)
        if dtype == "bfloat16" and kind is np.float32:
            np.left_shift(rows, 16, out=x.view(np.uint32), dtype=np.uint32)
        else:
            x[...] = as_float32(rows, dtype)
        yield x


def sums_of_levels(
    parts: Iterable[NDArray[Any]], scales: NDArray[np.float32], dim: NDArray[np.float32], counted: Marks
) -> tuple[RowSums, NDArray[np.int16]]:
    """Sums of quantised rows in parts, as they are decoded, in float32; and the largest absolute level of each row."""
    norms, levels, at = np.empty(len(counted)), np.empty(len(counted), np.int16), 0
    memory: tuple[NDArray[Any], ...] = (np.empty(0),)
    total, squares, wide = np.zeros(len(dim)), np.zeros(len(dim)), np.square(dim, dtype="f4")
    weights = np.where(counted, scales, np.float32(0))
    with np.errstate(all="ignore"):
        for q in parts:
            if len(memory[0]) < len(q):
                memory = tuple(np.empty(q.shape, kind) for kind in (np.int8, np.int16, np.float32))
            here, (positive, whole, x) = slice(at, at + len(q)), (each[: len(q)] for each in memory)
            np.abs(q, out=positive)  # -128 is its own absolute value, and 128 as uint8
            starts = np.arange(0, q.size, q.shape[1])
            levels[here] = np.maximum.reduceat(positive.view(np.uint8).reshape(-1), starts)  # thrice as fast as max
            whole[...] = q  # numpy is faster by way of int16
            x[...] = whole
            total += weights[here] @ x
            np.square(x, out=x)
            squares += np.square(weights[here]) @ x
            norms[here] = np.sqrt(x @ wide) * scales[here]
            at += len(q)
        total, squares = total * dim, squares * np.square(dim, dtype="f8")
    return RowSums(norms, total, squares), levels


def row_sums(parts: Iterable[NDArray[Any]], counted: Marks) -> RowSums:
    """Sums of rows [n, d_in] in parts, which are overwritten."""
    norms, at = np.empty(len(counted)), 0
    total: Floats | float = 0.0
    squares: Floats | float = 0.0
    with np.errstate(all="ignore"):
        for x in parts:
            here = slice(at, at + len(x))
            weights, ones = counted[here].astype(x.dtype), np.ones(x.shape[1], x.dtype)
            found = weighted_sums(weights, x)
            lost = None if np.isfinite(found).all() else ~np.isfinite(x).all(axis=1)
            if lost is not None:  # a NaN times 0 is a NaN
                x[lost], weights[lost] = 0, 0
                found = weighted_sums(weights, x)
            total = total + found
            np.multiply(x, x, out=x)
            squares = squares + weighted_sums(weights, x)
            norms[here] = np.sqrt(x @ ones)
            if lost is not None:
                norms[here][lost] = np.nan
            at += len(x)
    return RowSums(norms, np.asarray(total), np.asarray(squares))


def weighted_sums(weights: NDArray[Any], x: NDArray[Any]) -> Floats:
    """[d_in] sums over rows [n, d_in] times their weights [n], AT_ONCE at a time in the type of `x`."""
    total = np.zeros(x.shape[1])
    for at in range(0, len(x), AT_ONCE):
        total += weights[at : at + AT_ONCE] @ x[at : at + AT_ONCE]
    return total
