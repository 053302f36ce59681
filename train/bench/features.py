"""Runs `sagsae bench features`. It compares the CPU seconds of the pass over a store with those of encoding the same
rows alone, by the same threads, with nothing kept."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from shared.bench.scale import measured
from shared.bench.timing import machine
from shared.progress import hush
from shared.schemas.features import FeaturesConfig
from train.features.job import FeaturesJob, make_job
from train.features.run import FeaturesSummary, features, one_thread_each
from train.features.tables import FILES

VALUES: Final = 1 << 20
"""Latents of all rows that are encoded at a time: 4 MiB. Other sizes are not faster."""


@dataclass(frozen=True)
class FeaturesRound:
    """The figures of one round."""

    encode: float
    """CPU seconds of encoding alone."""
    whole: float
    """CPU seconds of the pass."""
    seconds: float
    """Its duration."""
    anonymous: int
    """Memory that it took beyond what the process had before, at most: bytes."""


def bench_features(run: Path, sae: str | None, rounds: int, advance: Callable[[int, str], None]) -> dict[str, Any]:
    """Measures both in turns, in this process, after a round whose time does not count. The last result stays in
    RUN/features/. Raises UserError as `features` does."""
    config = FeaturesConfig(run=run, sae=sae, device="cpu", overwrite=True)
    with hush():
        job, found = make_job(config), []
        for _ in range(rounds + 1):
            gc.collect()
            encode = encode_seconds(job)
            advance(1, "encode")
            done: list[FeaturesSummary] = []
            whole = measured(lambda to=done: to.append(features(config)))  # type: ignore[misc]
            advance(1, "pass")
            found.append(FeaturesRound(encode, whole.cpu_seconds, whole.seconds, whole.anonymous))
    return report(job, done[0], found)


def encode_seconds(job: FeaturesJob) -> float:
    """CPU seconds of encoding every row that counts. Reading is not in them."""
    spent, rows = 0.0, max(1, VALUES // job.shape.d_sae)

    def encode(part: Tensor) -> None:
        job.sae.encode(part)

    with one_thread_each(torch.get_num_threads()) as pool, torch.no_grad():
        for shard in job.source.shards:
            parts = torch.split(job.source.read(shard).values, rows)
            started = time.process_time()
            list(pool.map(encode, parts))
            spent += time.process_time() - started
    return spent


def report(job: FeaturesJob, done: FeaturesSummary, every: list[FeaturesRound]) -> dict[str, Any]:
    """Ratios, raw figures, and a table of the CPU seconds. The first round counts for memory alone: later ones find
    what it left."""
    rounds = every[1:]
    sizes = {name: round((done.folder / name).stat().st_size / job.shape.d_sae) for name in FILES}
    figures = {"encode": [each.encode for each in rounds], "pass": [each.whole for each in rounds]}
    table = [
        {"what": what, "CPU s": round(median(cpu), 2), "lowest": round(min(cpu), 2), "highest": round(max(cpu), 2)}
        for what, cpu in figures.items()
    ]
    ratios = {
        "pass_vs_encode": round(median(each.whole / each.encode for each in rounds), 3),
        "bytes_per_latent": sum(sizes.values()),
        "memory_mb": round(max(each.anonymous for each in every) / 1e6),
    }
    about = {"d_in": job.sae.d_in, "d_sae": job.shape.d_sae, "poles": job.shape.poles, "l0": round(done.l0, 2)}
    raw = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "sae": done.sae,
        "rows": done.rows,
        **about,
        "seconds": [round(each.seconds, 2) for each in rounds],
        "bytes_per_latent_by_file": sizes,
        "figures": table,
    }
    return {"ratios": ratios, "raw": raw, "table": table}
