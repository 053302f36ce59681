"""Times alternatives against each other in one run: interleaved rounds, medians, CPU seconds of the whole process.

CPU seconds, not wall time, because on a busy machine only they repeat. A figure counts every thread that the measured
code uses, its own or a library's.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.store.opened import Store
from shared.store.spec import DTYPES

Run = Callable[[], int]
"""Does the work once and returns the (uncompressed) bytes that it moved."""


@dataclass(frozen=True)
class TimedFigure:
    """The speed of one run, round by round."""

    by_cpu: list[float]
    """MB per CPU second."""
    by_wall: list[float]
    """MB per second."""

    def row(self) -> dict[str, int]:
        return {
            "MB/CPU s": round(statistics.median(self.by_cpu)),
            "lowest": round(min(self.by_cpu)),
            "highest": round(max(self.by_cpu)),
            "MB/s": round(statistics.median(self.by_wall)),
        }


def interleaved(
    runs: Mapping[str, Run],
    rounds: int,
    advance: Callable[[int, str], None],
    before: Mapping[str, Callable[[], None]] | None = None,
) -> dict[str, TimedFigure]:
    """Runs every function once per round, after one warm-up round. The order alternates. `before` runs before a
    function and is not measured."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            gc.collect()
            if before and name in before:
                before[name]()
            wall, cpu = time.perf_counter(), time.process_time()
            moved = runs[name]() / 1e6
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                found[name].append((moved / cpu, moved / wall))
            advance(1, name)
    return {name: TimedFigure([cpu for cpu, _ in pairs], [wall for _, wall in pairs]) for name, pairs in found.items()}


def ratio(figures: Mapping[str, TimedFigure], one: str, other: str) -> float | None:
    """The ratio of two CPU efficiencies, as the median over the rounds: a disturbance of the machine affects both. None
    where one was not measured."""
    if one not in figures or other not in figures:
        return None
    pairs = zip(figures[one].by_cpu, figures[other].by_cpu, strict=True)
    return round(statistics.median(ours / theirs for ours, theirs in pairs), 3)


def store_report(
    narrow: Store, wide: Mapping[str, Store], figures: Mapping[str, TimedFigure], wait_share: float
) -> dict[str, Any]:
    """Ratios by name, and the raw figures. `ratio_zstd` is that of the hookpoints as harvested; all others are of the
    store that was read. `checksums_vs_verify_full` is how many times as long verifying takes."""

    def against(one: str, other: str, codec: str = "zstd") -> float | None:
        return ratio(figures, f"{one} {codec}", f"{other} {codec}")

    ratios: dict[str, Any] = {f"ratio_{codec}": ratio_of(store) for codec, store in wide.items()}
    ratios["ratio_zstd"] = ratio_of(narrow)
    for end, codec in (("", "zstd"), ("_lz4", "lz4"), ("_none", "none"), ("_int8", "int8")):
        ratios[f"reader_vs_decode{end}"] = against("reader", "decode", codec)
        ratios[f"reader_crc_vs_decode{end}"] = against("reader with crc", "decode", codec)
        ratios[f"windows_vs_decode{end}"] = against("windows", "decode", codec)
        ratios[f"batches_vs_decode{end}"] = against("batches", "decode", codec)
        ratios[f"windows_crc_vs_decode{end}"] = against("windows with crc", "decode", codec)
        ratios[f"batches_crc_vs_decode{end}"] = against("batches with crc", "decode", codec)
        ratios[f"checksums_vs_verify_full{end}"] = against("checksums", "verify --full", codec)
        ratios[f"two_threads_vs_one{end}"] = against("reader with crc, 2 threads", "reader with crc", codec)
    for codec in ("zstd", "lz4"):
        for end, other in (("zarr", "zarr-python"), ("zarrs", "zarrs"), ("tensorstore", "tensorstore")):
            ratios[f"reader_vs_{end}_{codec}"] = against("reader with crc", other, codec)
        ratios[f"writer_vs_encode_{codec}"] = against("writer", "encode", codec)
    ratios["wait_share_at_half_speed"] = wait_share
    table = [{"what": name, **figure.row()} for name, figure in figures.items()]
    d_in = {path: hook.d_in for store in (narrow, wide["zstd"]) for path, hook in store.spec.hookpoints.items()}
    raw = {"machine": machine(), "d_in": d_in, "tokens": narrow.n_rows, "figures": table}
    return {"ratios": ratios, "table": table, "raw": raw}


def ratio_of(store: Store) -> float:
    """Uncompressed over stored bytes, of all hookpoints together."""
    spec = store.spec
    raw = sum(store.n_rows * hook.d_in * DTYPES[spec.dtype][0].itemsize for hook in spec.hookpoints.values())
    return round(raw / sum(store.stored_bytes(hook) for hook in spec.hookpoints), 4)


def machine() -> dict[str, Any]:
    """The machine on which the figures were measured."""
    return {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
