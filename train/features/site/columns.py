"""Reads Parquet files a few latents at a time, as numpy arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared.errors import DamagedError
from train.features.readers.folder import opened
from train.features.slots import counted_off


def by_latents(path: Path, d_sae: int, step: int) -> Iterator[pa.Table]:
    """Yields the rows of latents 0 to step, step to 2 step, …, of a file that is sorted by latent. Only a row group and
    what is left of the one before it are in memory."""
    with opened(path, {"latent": "int"}) as file:
        groups = iter(range(file.num_row_groups))
        held = file.schema_arrow.empty_table()
        for start in range(0, d_sae, step):
            end = min(d_sae, start + step)
            while not len(held) or held["latent"][-1].as_py() < end:
                group = next(groups, None)
                if group is None:
                    break
                held = pa.concat_tables([held, file.read_row_group(group)])
            many = int(np.searchsorted(numbers(held["latent"]), end))
            yield held.slice(0, many).combine_chunks()
            held = held.slice(many)


def numbers(column: Any) -> NDArray[Any]:
    """A column of numbers."""
    array: NDArray[Any] = column.to_numpy()
    return array


@dataclass(frozen=True)
class ListColumn:
    """A column of lists: how long each is, and the members of their entries, one list after the other."""

    lengths: NDArray[np.int64]
    members: dict[str, NDArray[Any]]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.members[name]

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of each entry."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def first(self, many: int) -> "ListColumn":
        """At most so many entries of each list."""
        return self.where(counted_off(self.rows) < many)

    def where(self, keep: NDArray[np.bool_]) -> "ListColumn":
        """The entries that are marked."""
        lengths = np.bincount(self.rows[keep], minlength=len(self.lengths))
        return ListColumn(lengths, {name: values[keep] for name, values in self.members.items()})

    def sorted_by(self, score: NDArray[Any]) -> "ListColumn":
        """Each list by falling score."""
        order = np.lexsort((-score, self.rows))
        return ListColumn(self.lengths, {name: values[order] for name, values in self.members.items()})


def lists(table: pa.Table, name: str, *members: str) -> ListColumn:
    """A column of lists of numbers (member "") or of structs. Nulls are empty lists."""
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = column.flatten()
    found = {each: (flat if each == "" else flat.field(each)) for each in members or ("",)}
    return ListColumn(lengths, {each: values.to_numpy(zero_copy_only=False) for each, values in found.items()})


def check_rows(path: Path, rows: int, count: int) -> None:
    """Raises DamagedError unless a file has as many rows as it should."""
    if rows != count:
        raise DamagedError(f"{path}: has {rows} rows instead of {count}. Make it again with --overwrite")
