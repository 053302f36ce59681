"""`sagsae bench remote`, the half that reads: a store through its activation cache against the same store's folder."""

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
LIMITS: Final = {"server_cpu_s_per_gb": 1.3, "wait_share_factor": 1.5, "wait_share_more": 0.05}
"""What docs/explanation/cache.md promises."""


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
    takes batches at half the speed at which the folder is read."""
    folder = read_all(here, hook, rounds, advance)
    before = server_cpu()
    service = read_all(served, hook, rounds, advance)
    cpu = (server_cpu() - before) / service.gigabytes
    fastest = epoch_seconds(here, hook)
    waits = {}
    for name, store in (("folder", here), ("service", served)):
        waits[name] = wait_share(store, hook, fastest, epochs=rounds)
        advance(1, f"wait share, {name}")
    return {
        "server_cpu_s_per_gb": round(cpu, 2),
        "folder_mb_per_s": round(folder.megabytes_per_second),
        "service_mb_per_s": round(service.megabytes_per_second),
        "stored_gb_read": round(service.gigabytes, 3),
        "wait_share_folder": waits["folder"],
        "wait_share_service": waits["service"],
        "wait_share_limit": round(LIMITS["wait_share_factor"] * waits["folder"] + LIMITS["wait_share_more"], 4),
        "server_cpu_limit": LIMITS["server_cpu_s_per_gb"],
    }
