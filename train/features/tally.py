"""Everything that one process has counted so far: it takes in shards, is saved, and merges with those of others."""

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from train.features.arrays import ArrayFile, read_arrays, write_arrays
from train.features.code import PLACE_BITS, PoleCode
from train.features.encode import BlockCode, BlockEncoder
from train.features.pairs import PairCounts, PairRun, pair_keys
from train.features.poles import PoleTable
from train.features.shard_rows import OrderedRows

KINDS: Final = ("on", "before", "after")
"""The token that a pole fires on, the one before it, the one after it."""
READ: Final = "read"
"""The counts of the tokens of all rows, as those of pole 0."""


@dataclass(frozen=True)
class TallyShape:
    """What decides the shape of a tally, and how firings are sampled."""

    d_sae: int
    sides: int
    """Poles of a latent: 2 where latents carry a sign, else 1."""
    context: int
    scale: float
    top: int
    drawn: int
    cofire_every: int

    @property
    def poles(self) -> int:
        return self.sides * self.d_sae


@dataclass(frozen=True)
class BlockFindings:
    """What one block of latents adds on one shard, beside the counts in the table."""

    pairs: dict[str, NDArray[np.int64]]
    """Keys of (pole, token), one for each firing."""
    places: NDArray[np.int64]
    poles: NDArray[np.int64]
    """The firings on sampled tokens: their places and poles."""
    edge_keys: NDArray[np.int64]
    edge_values: NDArray[np.float32]
    """The firings in contexts that go beyond the shard: (latent, place), and the signed value."""


@dataclass
class Tally:
    """The counts of some shards."""

    shape: TallyShape
    folder: Path
    name: str
    """What the names of its files begin with."""
    done: list[int] = field(default_factory=list)
    rows: int = 0
    sampled: int = 0
    """Rows on which it was counted what fires together."""
    firings: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    """Place and pole of the firings on them."""
    edges: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = self.shape
        self.table = PoleTable(shape.poles, shape.top, shape.drawn, shape.context, shape.scale)
        self.pairs = {kind: PairCounts(self.folder, f"{self.name}-{kind}") for kind in (*KINDS, READ)}

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.tally"

    def take(self, shard: int, rows: OrderedRows, encoder: BlockEncoder, pool: Executor) -> None:
        """Counts one shard. Each thread of `pool` computes one block of latents at a time."""
        if encoder.whole:
            found = list(pool.map(lambda code: self.take_block(code, rows), encoder.blocks(rows.values)))
        else:
            block = partial(encoder.block, values=rows.values)
            found = list(pool.map(lambda first: self.take_block(block(first), rows), encoder.firsts))
        for kind, each in product(KINDS, found):
            self.pairs[kind].add(each.pairs[kind])
        self.pairs[READ].add(rows.ids[rows.places - rows.first].astype(np.int64))
        self.firings += [(each.places, each.poles) for each in found if len(each.places)]
        self.edges += [(each.edge_keys, each.edge_values) for each in found if len(each.edge_keys)]
        self.sampled += int((rows.places % self.shape.cofire_every == 0).sum())
        self.rows += len(rows.places)
        self.done.append(shard)

    def take_block(self, code: BlockCode, rows: OrderedRows) -> BlockFindings:
        """Counts one block of latents on one shard."""
        shape = self.shape
        poles = PoleCode(code, rows, shape.context, shape.sides)
        self.table.take(poles)
        pole, place, position = poles.pole, poles.place, poles.place % shape.context
        ids, here = rows.ids, poles.place - rows.first
        pairs = {"on": pair_keys(pole, ids[here].astype(np.int64))}
        last = (position == shape.context - 1) | (place == rows.end - 1)
        for kind, step, inside in (("before", -1, position > 0), ("after", 1, ~last)):
            pairs[kind] = pair_keys(pole[inside], ids[here[inside] + step].astype(np.int64))
        chosen = place % shape.cofire_every == 0
        begins = poles.place - position
        beyond = (begins < rows.start) | (begins + shape.context > rows.stop)
        latent = poles.latent[beyond] + code.first
        return BlockFindings(
            pairs, place[chosen], pole[chosen], latent << PLACE_BITS | place[beyond], poles.value[beyond]
        )

    def save(self) -> None:
        """Writes all counts, whole or not at all."""
        for pairs in self.pairs.values():
            pairs.settle()
        runs = {kind: PairRun.joined(pairs.runs) for kind, pairs in self.pairs.items()}
        arrays: dict[str, NDArray[np.generic]] = {f"table/{key}": value for key, value in self.table.arrays().items()}
        arrays |= {f"{kind}/keys": run.keys for kind, run in runs.items()}
        arrays |= {f"{kind}/counts": run.counts for kind, run in runs.items()}
        self.firings, self.edges = [self.all_firings()], [self.all_edges()]
        arrays |= dict(zip(("firings/place", "firings/pole"), self.firings[0], strict=True))
        arrays |= dict(zip(("edges/key", "edges/value"), self.edges[0], strict=True))
        arrays |= {"done": np.array(self.done, np.int64)}
        files = {kind: pairs.files for kind, pairs in self.pairs.items()}
        write_arrays(self.file, {"rows": self.rows, "sampled": self.sampled, "files": files}, arrays)

    def all_firings(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Place and pole of the firings on sampled rows."""
        return joined_pairs(self.firings, np.dtype(np.int64))

    def all_edges(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(latent, place) and value of the firings in contexts that two shards share."""
        return joined_pairs(self.edges, np.dtype(np.float32))

    def load(self) -> None:
        """Takes in its own file; for a tally that has counted nothing. Raises DamagedError when it was altered."""
        found = read_arrays(self.file)
        for key, array in self.table.arrays().items():
            array[...] = checked(found, f"table/{key}", array, self.file)
        self.adopt(found)

    def merge(self, path: Path) -> None:
        """Adds the counts in the file of another tally. Raises DamagedError when it was altered."""
        found = read_arrays(path)
        self.table.merge(
            {key: checked(found, f"table/{key}", array, path) for key, array in self.table.arrays().items()}
        )
        self.adopt(found)

    def adopt(self, found: ArrayFile) -> None:
        """Adds all counts of a file but those in the table."""
        self.done += done_in(found)
        self.rows += int(found.about["rows"])
        self.sampled += int(found.about["sampled"])
        for kind, pairs in self.pairs.items():
            pairs.runs.append(PairRun(*(np.array(found.arrays[f"{kind}/{key}"]) for key in ("keys", "counts"))))
            pairs.files += [Path(str(name)).name for name in found.about["files"][kind]]
        self.firings.append((np.array(found.arrays["firings/place"]), np.array(found.arrays["firings/pole"])))
        self.edges.append((np.array(found.arrays["edges/key"]), np.array(found.arrays["edges/value"])))


def joined_pairs(parts: Iterable[tuple[NDArray[Any], NDArray[Any]]], second: np.dtype[Any]) -> tuple[Any, Any]:
    """Concatenates pairs of arrays, the first of int64."""
    one, other = zip((np.empty(0, np.int64), np.empty(0, second)), *parts, strict=True)
    return np.concatenate(one), np.concatenate(other)


def checked(found: ArrayFile, name: str, like: NDArray[np.generic], path: Path) -> NDArray[np.generic]:
    """Returns an array of a file. Raises DamagedError unless it has the type and shape of `like`."""
    array = found.arrays.get(name)
    if array is None or array.dtype != like.dtype or array.shape != like.shape:
        raise DamagedError(f"{path}: has no array {name} of this autoencoder. Start again with --overwrite")
    return array


def done_in(found: ArrayFile) -> list[int]:
    """The shards that a saved tally has counted."""
    done: list[int] = found.arrays["done"].tolist()
    return done
