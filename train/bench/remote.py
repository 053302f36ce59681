"""`sagsae bench remote`: reading a store through its activation cache, compared with reading its folder."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shared.permute import permutation
from shared.store.opened import Store
from shared.store.reader import ArrayReader
from train.bench.store import epoch_seconds, wait_share

CHUNKS_READ: Final = 2
"""Chunks of one request: about 3 MB."""
THREADS: Final = 2
SPEEDS: Final = {"half_speed": 1.0, "quarter_speed": 2.0}
"""How fast a device takes batches, and the factor of `wait_share`'s time for it, which is twice an epoch already."""
LIMITS: Final = {"server_cpu_s_per_gb": 1.3, "wait_share_factor": 1.5, "wait_share_more": 0.05}
"""The most that the server may take, and how much longer a device may wait than with the folder: share times factor,
plus five points."""


@dataclass(frozen=True)
class ReadingFigure:
    """Reading one hookpoint once, chunk by chunk in random order."""

    megabytes_per_second: float
    """Uncompressed."""
    gigabytes: float
    """Stored bytes that were read, in all rounds together."""


def read_all(store: Store, hook: str, rounds: int, advance: Callable[[int, str], None]) -> ReadingFigure:
    """Reads and checks every chunk on two threads, `rounds` times; the median speed."""
    reader = ArrayReader(store, hook)
    rows, count = reader.layout.chunk_rows, CHUNKS_READ
    places = [(s, c) for s, commit in store.commits.items() for c in range(0, commit.rows // rows - count + 1, count)]
    places = [places[i] for i in permutation(len(places), 0, 99)]
    stored = sum(int(reader.index(s)[c : c + count, 1].sum()) for s, c in places)
    outs = [np.empty((count * rows, *reader.layout.row_shape), reader.layout.dtype) for _ in range(THREADS)]

    def half(number: int) -> None:
        for shard, chunk in places[number::THREADS]:
            reader.read_run(shard, chunk, count, outs[number])

    speeds = []
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(rounds):
            since = time.monotonic()
            list(pool.map(half, range(THREADS)))
            speeds.append(len(places) * outs[0].nbytes / 1e6 / (time.monotonic() - since))
            advance(1, "read")
    return ReadingFigure(statistics.median(speeds), stored * rounds / 1e9)


def compare(
    here: Store,
    served: Store,
    hook: str,
    rounds: int,
    server_cpu: Callable[[], float],
    advance: Callable[[int, str], None],
) -> dict[str, Any]:
    """Speed, CPU seconds of the server per GB of stored bytes, and the share of time for which a device waits that
    takes batches at a half and at a quarter of the speed at which the folder is read. The server works on the cores of
    the reader here."""
    folder = read_all(here, hook, rounds, advance)
    before = server_cpu()
    service = read_all(served, hook, rounds, advance)
    cpu = (server_cpu() - before) / service.gigabytes
    full_speed = epoch_seconds(here, hook, THREADS)
    waits = {}
    for words, part in SPEEDS.items():
        for name, store in (("folder", here), ("service", served)):
            waits[f"{words}_wait_share_{name}"] = wait_share(store, hook, part * full_speed, 2 * rounds, THREADS)
            advance(1, f"wait share, {name}")
        folder_share = waits[f"{words}_wait_share_folder"]
        limit = LIMITS["wait_share_factor"] * folder_share + LIMITS["wait_share_more"]
        waits[f"{words}_wait_share_limit"] = round(limit, 4)
    return {
        "server_cpu_s_per_gb": round(cpu, 2),
        "folder_mb_per_s": round(folder.megabytes_per_second),
        "service_mb_per_s": round(service.megabytes_per_second),
        "stored_gb_read": round(service.gigabytes, 3),
        "server_cpu_limit": LIMITS["server_cpu_s_per_gb"],
        **waits,
    }
