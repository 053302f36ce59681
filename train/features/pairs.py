"""Counts of (pole, token), in memory while they are few, else in sorted files that are merged at the end."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from train.features.arrays import read_arrays, write_arrays
from train.features.slots import is_first

TOKEN_BITS: Final = 32
"""Bits of a token id in a key (pole, token)."""
WAITING: Final = 1 << 21
"""Keys that are sorted and counted together: 16 MiB."""
RUNS: Final = 8
"""Sorted runs in memory that are merged into one."""
SPILLED: Final = 1 << 20
"""Pairs in memory above which they are written to a file: 12 MiB."""


@dataclass(frozen=True)
class PairRun:
    """Counts of pairs, by rising key."""

    keys: NDArray[np.int64]
    """pole << TOKEN_BITS | token"""
    counts: NDArray[np.uint32]

    @classmethod
    def of(cls, keys: NDArray[np.int64]) -> "PairRun":
        """Counts pairs that stand in any order."""
        keys = np.sort(keys)
        starts = np.flatnonzero(is_first(keys))
        return cls(keys[starts], np.diff(np.append(starts, len(keys))).astype(np.uint32))

    @classmethod
    def joined(cls, runs: "list[PairRun]") -> "PairRun":
        """Puts runs together whose keys are above those of the runs before them."""
        keys = [np.empty(0, np.int64), *(run.keys for run in runs)]
        return cls(np.concatenate(keys), np.concatenate([np.empty(0, np.uint32), *(run.counts for run in runs)]))

    @classmethod
    def merged(cls, runs: "list[PairRun]") -> "PairRun":
        """Adds up the counts of runs."""
        if len(runs) == 1:
            return runs[0]
        both = cls.joined(runs)
        bits = int(both.counts.max(initial=0)).bit_length()
        if int(both.keys.max(initial=0)).bit_length() + bits < 64:  # whole numbers are sorted far faster than indexes
            words = np.sort(both.keys << bits | both.counts)
            keys, counts = words >> bits, words & ((1 << bits) - 1)
        else:
            order = np.argsort(both.keys)
            keys, counts = both.keys[order], both.counts[order].astype(np.int64)
        starts = np.flatnonzero(is_first(keys))
        sums = np.add.reduceat(counts, starts) if len(keys) else np.empty(0, np.int64)
        return cls(keys[starts], sums.astype(np.uint32))

    def within(self, low: int, high: int) -> "PairRun":
        """The pairs of the poles `low` to `high`."""
        first, last = np.searchsorted(self.keys, [low << TOKEN_BITS, high << TOKEN_BITS])
        return PairRun(np.asarray(self.keys[first:last]), np.asarray(self.counts[first:last]))

    @property
    def poles(self) -> NDArray[np.int64]:
        return self.keys >> TOKEN_BITS

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self.keys & ((1 << TOKEN_BITS) - 1)


def pair_keys(pole: NDArray[np.int64], token: NDArray[np.int64]) -> NDArray[np.int64]:
    return pole << TOKEN_BITS | token


@dataclass
class PairCounts:
    """Counts of (pole, token) over all shards taken in so far."""

    folder: Path
    """Where files are written."""
    name: str
    """What their names begin with."""
    runs: list[PairRun] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    waiting: list[NDArray[np.int64]] = field(default_factory=list)
    """Keys that are not counted yet."""

    def add(self, keys: NDArray[np.int64]) -> None:
        """Takes in pairs in any order."""
        self.waiting.append(keys)
        if sum(map(len, self.waiting)) >= WAITING:
            self.count()
            if len(self.runs) >= RUNS:
                self.settle()

    def count(self) -> None:
        """Makes a run of the keys that wait."""
        if self.waiting:
            self.runs.append(PairRun.of(np.concatenate(self.waiting)))
            self.waiting = []

    def settle(self) -> None:
        """Merges what is in memory into one run, and writes it to a file when it is long."""
        self.count()
        if self.runs:
            self.runs = [PairRun.merged(self.runs)]
        if self.runs and len(self.runs[0].keys) > SPILLED:
            name = f"{self.name}-{len(self.files):06d}.pairs"
            write_arrays(self.folder / name, {}, {"keys": self.runs[0].keys, "counts": self.runs[0].counts})
            self.files.append(name)
            self.runs = []

    def opened(self) -> "list[PairRun]":
        """All runs, those in files mapped into memory. Raises DamagedError when a file was altered."""
        found = [read_arrays(self.folder / name).arrays for name in self.files]
        files = [PairRun(each["keys"].view(np.int64), each["counts"].view(np.uint32)) for each in found]
        return [*files, *self.runs]


def by_poles(runs: list[PairRun], poles: int, step: int) -> Iterator[PairRun]:
    """Yields the sums of all runs for `step` poles at a time."""
    for low in range(0, poles, step):
        yield PairRun.merged([run.within(low, low + step) for run in runs] or [PairRun.joined([])])
