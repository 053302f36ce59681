"""Writes what was counted as Parquet files: one row per pole, per example, per (pole, token), per token."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shared.store.tokens import TokenRows
from train.features.code import BEFORE, DRAWN_AFTER, DRAWN_BEFORE, WINDOW, windows_in
from train.features.cofire import Cofiring
from train.features.lens import LensTokens
from train.features.pairs import PairRun, by_poles
from train.features.poles import quantiles
from train.features.rules import LexicalRules, lexical_rules
from train.features.site.words import Vocabulary
from train.features.slots import Slots, counted_off, first_of_each, lottery
from train.features.tally import KINDS, READ, Tally

FILES: Final = ("latents.parquet", "examples.parquet", "pairs.parquet", "tokens.parquet")
POLES: Final = 1024
"""Poles written at a time: a row group of latents.parquet."""
TOKENS: Final = 16
"""Tokens listed for each pole."""
FEWEST: Final = 3
"""Firings on a token that make it a row of pairs.parquet."""
MOST_COUNTED: Final = np.uint64((1 << 32) - 1)
BANDS: Final = 4
PLAIN: Final = ("firings", "tokens.list.element", "values.list.element")
SPLIT: Final = ("count", "hist.list.element", *(f"{name}.list.element.count" for name in KINDS))
DELTA: Final = (
    *("latent", "context", "token", "rule.list.element", "lens.list.element.token"),
    *(f"{name}.list.element.latent" for name in ("near", "far", "cofire")),
)
PAGE_BYTES: Final = 1 << 26
"""Pages are compressed one by one, and neighbouring poles share contexts."""
KEPT_BITS: Final = 12
"""Bits of the mantissa of a float that is no sum and no firing: four digits."""
BUCKETS: Final = 32
"""Ranges of tokens in which pairs.parquet is sorted."""


@dataclass(frozen=True)
class Neighbours:
    """The rows of the decoder most alike each row, and most opposite to it: [d_sae, n], the most extreme first."""

    near: NDArray[np.int64]
    near_cosine: NDArray[np.float32]
    far: NDArray[np.int64]
    far_cosine: NDArray[np.float32]


@dataclass(frozen=True)
class FeatureTables:
    """All that the Parquet files are made from."""

    tally: Tally
    tokens: TokenRows
    neighbours: Neighbours
    cofiring: Cofiring
    lens: LensTokens | None
    vocabulary: Vocabulary

    def write(self, folder: Path) -> None:
        """Writes the files into a folder."""
        runs = {kind: self.tally.pairs[kind].opened() for kind in (*KINDS, READ)}
        read = counts_by_token(next(by_poles(runs[READ], 1, 1)))
        steps = [by_poles(runs[kind], self.tally.shape.poles, POLES) for kind in KINDS]
        edges = sorted_edges(self.tally)
        self.vocabulary.write(folder / "tokens.parquet", read)
        with (
            Writer(folder / "latents.parquet") as latents,
            Writer(folder / "examples.parquet") as examples,
            SortedPairs(folder, self.tally.shape.sides, len(read)) as pairs,
        ):
            for start, counted in zip(range(0, self.tally.shape.poles, POLES), zip(*steps, strict=True), strict=True):
                poles = slice(start, min(self.tally.shape.poles, start + POLES))
                latents.add(self.latents(poles, dict(zip(KINDS, counted, strict=True)), read))
                examples.add(self.examples(poles, edges))
                pairs.add(counted[0])

    def latents(self, poles: slice, pairs: dict[str, PairRun], read: NDArray[np.int64]) -> dict[str, pa.Array]:
        """The columns of latents.parquet for some poles."""
        table, shape = self.tally.table, self.tally.shape
        firings, hist = table.firings[poles], table.hist[poles]
        mass, energy = table.mass.values()[poles], table.energy.values()[poles]
        whole = table.energy.values().reshape(-1, shape.sides).sum(1).repeat(shape.sides)[poles]
        with np.errstate(invalid="ignore"):
            share, mean = np.where(whole > 0, energy / whole, 0.0), np.where(firings > 0, mass / firings, 0.0)
        rules = lexical_rules(pairs["on"], poles.start, firings, read)
        largest = np.abs(table.best.value[poles, 0])
        return {
            **sides_of(np.arange(poles.start, poles.stop), shape.sides),
            "firings": column(firings),
            "mass": column(mass),
            "energy": column(energy),
            "max": column(largest),
            "mean": column(mean.astype(np.float32)),
            "q50": column(rounded(np.nan_to_num(quantiles(hist, 0.5, shape.scale)))),
            "q95": column(rounded(np.nan_to_num(quantiles(hist, 0.95, shape.scale)))),
            "share_of_energy": column(share.astype(np.float32)),
            "hist": pa.FixedSizeListArray.from_arrays(column(hist.reshape(-1)), hist.shape[1]),
            **{kind: frequent(run, poles) for kind, run in pairs.items()},
            "lens": self.lens_column(poles),
            "rule": rule_column(rules, poles),
            "rule_f1": column(rules.f1.astype(np.float32)),
            **self.directions(poles),
            "cofire": cofire_column(self.cofiring, poles, shape.sides),
        }

    def lens_column(self, poles: slice) -> pa.Array:
        """null where there is no lens."""
        kind = pa.list_(pa.struct([("token", pa.uint32()), ("logit", pa.float32())]))
        if self.lens is None:
            return pa.nulls(poles.stop - poles.start, kind)
        token, logit = self.lens.token[poles], self.lens.logit[poles]
        lengths = np.full(len(token), token.shape[1])
        return lists(lengths, token=token.reshape(-1).astype(np.uint32), logit=rounded(logit.reshape(-1)))

    def directions(self, poles: slice) -> dict[str, pa.Array]:
        """Columns `near` and `far`. For a pole below zero, whose direction is the opposite one, they change places."""
        sides, found = self.tally.shape.sides, self.neighbours
        latent, below = np.divmod(np.arange(poles.start, poles.stop), sides)
        sign = np.where(below == 1, -1, 1).astype(np.float32)[:, None]
        near = found.near[latent], found.near_cosine[latent]
        far = found.far[latent], found.far_cosine[latent]
        lengths = np.full(len(latent), found.near.shape[1])
        columns = {}
        for name, above, under in (("near", near, far), ("far", far, near)):
            other, cosine = np.where(sign > 0, above[0], under[0]), np.where(sign > 0, above[1], -under[1])
            columns[name] = lists(
                lengths, latent=other.reshape(-1).astype(np.int32), cosine=rounded(cosine.reshape(-1))
            )
        return columns

    def examples(self, poles: slice, edges: tuple[NDArray[np.int64], NDArray[np.float32]]) -> dict[str, pa.Array]:
        """The columns of examples.parquet for some poles."""
        table, spec = self.tally.table, self.tokens.spec
        best, drawn = chosen(table.best, poles), chosen(table.drawn, poles)
        largest = np.abs(table.best.value[:, 0])
        band = 1 + np.minimum(BANDS - 1, BANDS * np.abs(drawn.value) // largest[drawn.pole]).astype(np.int64)
        order = np.lexsort((lottery(drawn.pole, drawn.value, drawn.place), band, drawn.pole))
        drawn, band = drawn.at(order), band[order]
        every = ChosenFirings.joined(best, drawn)
        group = np.concatenate([np.zeros(len(best.pole), np.int64), band])
        rank = np.concatenate([counted_off(best.pole), counted_off(8 * drawn.pole + band)])
        order = np.lexsort((rank, group, every.pole))
        every, group, rank = every.at(order), group[order], rank[order]
        self.mend(every, edges)
        before, behind = np.where(group == 0, [[BEFORE], [WINDOW - BEFORE]], [[DRAWN_BEFORE], [DRAWN_AFTER + 1]])
        begin = np.maximum(every.place - before, every.place // spec.context * spec.context)
        end = np.minimum(every.place // spec.context * spec.context + spec.context, spec.n_tokens)
        end = np.minimum(every.place + behind, end)
        lengths = end - begin
        where = np.repeat(begin - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))
        within = where - np.repeat(every.place - BEFORE, lengths)
        values = every.window[np.repeat(np.arange(len(lengths)), lengths), within]
        offsets = column(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return {
            **sides_of(every.pole, self.tally.shape.sides),
            "group": column(group.astype(np.uint8)),
            "rank": column(rank.astype(np.uint8 if rank.max(initial=0) < 256 else np.uint16)),
            "value": column(every.value),
            "context": column((every.place // spec.context).astype(np.uint32)),
            "position": column((every.place % spec.context).astype(np.uint16)),
            "start": column((begin % spec.context).astype(np.uint16)),
            "tokens": pa.ListArray.from_arrays(offsets, column(self.ids_at(where))),
            "values": pa.ListArray.from_arrays(offsets, column(values)),
        }

    def mend(self, every: "ChosenFirings", edges: tuple[NDArray[np.int64], NDArray[np.float32]]) -> None:
        """Replaces the windows of firings whose context goes beyond their shard: the shard knew only its own part."""
        spec, shape = self.tokens.spec, self.tally.shape
        begin = every.place // spec.context * spec.context
        beyond = begin // spec.shard_rows != (begin + spec.context - 1) // spec.shard_rows
        latent, place = every.pole[beyond] // shape.sides, every.place[beyond]
        every.window[beyond] = windows_in(edges[0], edges[1], latent, place, spec.context)

    def ids_at(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """The token ids at places of the token stream."""
        context = self.tokens.spec.context
        contexts, at = np.unique(places // context, return_inverse=True)
        return self.tokens.take(contexts)[at, places % context]


@dataclass(frozen=True)
class ChosenFirings:
    """Firings from slots, by pole and then in the order of the slots."""

    pole: NDArray[np.int64]
    value: NDArray[np.float32]
    place: NDArray[np.int64]
    window: NDArray[np.float16]

    def at(self, order: NDArray[np.int64]) -> "ChosenFirings":
        return ChosenFirings(self.pole[order], self.value[order], self.place[order], self.window[order])

    @classmethod
    def joined(cls, one: "ChosenFirings", other: "ChosenFirings") -> "ChosenFirings":
        parts = ((getattr(one, name), getattr(other, name)) for name in ("pole", "value", "place", "window"))
        return cls(*map(np.concatenate, parts))


def chosen(slots: Slots, poles: slice) -> ChosenFirings:
    """The firings in the slots of some poles."""
    row, slot = np.nonzero(slots.place[poles] >= 0)
    row = row + poles.start
    return ChosenFirings(row, slots.value[row, slot], slots.place[row, slot], slots.window[row, slot])


def sorted_edges(tally: Tally) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The firings in contexts that two shards share, by (latent, place)."""
    keys, values = tally.all_edges()
    order = np.argsort(keys, kind="stable")
    return keys[order], values[order]


def counts_by_token(run: PairRun) -> NDArray[np.int64]:
    """Counts of tokens as an array over token ids."""
    counts = np.zeros(int(run.tokens.max(initial=0)) + 1, np.int64)
    counts[run.tokens] = run.counts
    return counts


# columns


def column(values: NDArray[Any]) -> pa.Array:
    """A column of numbers, without a copy. `pyarrow.array` would import pandas, which takes a second."""
    values = np.ascontiguousarray(values)
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def rounded(values: NDArray[Any]) -> NDArray[np.float32]:
    """Rounds to KEPT_BITS of the mantissa: a column of them is then a third to a half shorter."""
    gone = np.uint32(23 - KEPT_BITS)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (np.uint32(1) << gone - np.uint32(1))) >> gone << gone).view(np.float32)


def sides_of(pole: NDArray[np.int64], sides: int) -> dict[str, pa.Array]:
    """Columns `latent` and `sign`."""
    latent, below = np.divmod(pole, sides)
    return {"latent": column(latent.astype(np.int32)), "sign": column((1 - 2 * below).astype(np.int8))}


def lists(lengths: NDArray[np.int64], **members: NDArray[Any]) -> pa.Array:
    """A column of lists of structs, whose members are given one list after the other."""
    offsets = column(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    arrays = [column(values) for values in members.values()]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(arrays, list(members)))


def lengths_of(pole: NDArray[np.int64], poles: slice) -> NDArray[np.int64]:
    """How many entries each of some poles has."""
    return np.bincount(pole - poles.start, minlength=poles.stop - poles.start)


def frequent(run: PairRun, poles: slice) -> pa.Array:
    """The most frequent tokens of each pole with their counts."""
    order = first_of_each(run.poles, MOST_COUNTED - run.counts.astype(np.uint64), run.tokens, TOKENS)
    token, count = run.tokens[order].astype(np.uint32), run.counts[order].astype(np.int64)
    return lists(lengths_of(run.poles[order], poles), token=token, count=count)


def rule_column(rules: LexicalRules, poles: slice) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths_of(rules.pole, poles))]).astype(np.int32)
    return pa.ListArray.from_arrays(column(offsets), column(rules.token.astype(np.uint32)))


def cofire_column(found: Cofiring, poles: slice, sides: int) -> pa.Array:
    first, last = np.searchsorted(found.pole, [poles.start, poles.stop])
    latent, below = np.divmod(found.other[first:last], sides)
    return lists(
        lengths_of(found.pole[first:last], poles),
        latent=latent.astype(np.int32),
        sign=(1 - 2 * below).astype(np.int8),
        jaccard=rounded(found.jaccard[first:last]),
        lift=rounded(found.lift[first:last]),
    )


# files


def leaves(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """The columns as Parquet stores them: their paths and types."""
    for name, kind in zip(schema.names, schema.types, strict=True):
        if isinstance(kind, pa.ListType | pa.FixedSizeListType):
            name, kind = f"{name}.list.element", kind.value_type
        if isinstance(kind, pa.StructType):
            yield from ((f"{name}.{member.name}", member.type) for member in kind)
        else:
            yield name, kind


def encoding(leaf: str, kind: pa.DataType) -> str | None:
    """How a column is encoded before it is compressed; None: by a dictionary. Each was the shortest when measured."""
    if leaf in PLAIN:
        return "PLAIN"
    if kind in (pa.float32(), pa.float64()) or leaf in SPLIT:
        return "BYTE_STREAM_SPLIT"
    return "DELTA_BINARY_PACKED" if leaf in DELTA else None


class Writer:
    """A Parquet file that is written one row group at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def __enter__(self) -> "Writer":
        return self

    def add(self, columns: dict[str, pa.Array]) -> None:
        """Adds a row group. The first one decides the types of the columns."""
        batch = pa.table(columns)
        if self.file is None:
            encodings = {leaf: encoding(leaf, kind) for leaf, kind in leaves(batch.schema)}
            self.file = pq.ParquetWriter(
                self.path,
                batch.schema,
                version="2.6",
                compression="zstd",
                compression_level=10,
                data_page_size=PAGE_BYTES,
                use_dictionary=[leaf for leaf, how in encodings.items() if how is None],
                column_encoding={leaf: how for leaf, how in encodings.items() if how is not None},
                write_statistics=["latent", "sign", "token"],
            )
        self.file.write_table(batch.cast(self.file.schema), row_group_size=max(1, len(batch)))

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


class SortedPairs:
    """pairs.parquet: the pairs of (pole, token), sorted by token, so that a search for a token reads little."""

    def __init__(self, folder: Path, sides: int, vocabulary: int) -> None:
        self.path, self.sides = folder / "pairs.parquet", sides
        self.step = -(-vocabulary // BUCKETS)
        self.buckets = [folder / f"bucket-{number:02d}" for number in range(BUCKETS)]

    def __enter__(self) -> "SortedPairs":
        return self

    def add(self, run: PairRun) -> None:
        """Puts the pairs of some poles into the buckets of their tokens."""
        keep = run.counts >= FEWEST
        rows = np.stack([run.tokens[keep], run.poles[keep], run.counts[keep].astype(np.int64)], axis=1)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        cuts = np.searchsorted(rows[:, 0], self.step * np.arange(BUCKETS + 1))
        for path, first, last in zip(self.buckets, cuts[:-1], cuts[1:], strict=True):
            if last > first:
                with path.open("ab") as file:
                    file.write(rows[first:last].tobytes())

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.write()
        for path in self.buckets:
            path.unlink(missing_ok=True)

    def write(self) -> None:
        with Writer(self.path) as file:
            for path in self.buckets:
                rows = np.fromfile(path, np.int64).reshape(-1, 3) if path.exists() else np.empty((0, 3), np.int64)
                rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
                token, count = rows[:, 0].astype(np.uint32), rows[:, 2].astype(np.uint32)
                file.add({**sides_of(rows[:, 1], self.sides), "token": column(token), "count": column(count)})
