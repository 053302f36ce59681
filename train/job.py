"""What a training run will do, worked out before anything is written."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from shared.config import TrainConfig
from shared.errors import DamagedError, UserError
from shared.files import is_remote
from shared.listing import folder_name
from shared.progress import say
from shared.saes import SAEConfig
from shared.store import Statistics, Store, find_hookpoint
from train.autoencoder import matmul_dtype
from train.folder import FREE, RunFolder
from train.follow import Segments
from train.loader import Pass, Passes, Same
from train.massive import LeftOut, left_out, norm_limit, statistics, without
from train.order import Order, Split, make_order, rows_together, split
from train.rows import Kept, Rows

ROWS_PER_RUN_CHUNK: Final = 262_144
"""So many rows of a window allow one chunk more in a run: then the variance of a batch's mean stays near 1.15 times
that of independent rows (tests/test_shuffle.py)."""


@dataclass(frozen=True)
class Job:
    """A configuration with every question answered, before anything is written."""

    config: TrainConfig
    store: Store
    hook: str
    parts: Split
    passes: Passes
    streams: int
    steps: int
    epoch_rows: int
    heldout_rows: int
    matmul: torch.dtype
    folder: RunFolder
    identity: dict[str, Any]
    on_cpu: bool
    waves: tuple[tuple[SAEConfig, ...], ...]
    """Which autoencoders are trained together, one wave after another (train/waves.py)."""
    wave: int = 1
    """Whose turn it is."""
    left_out: LeftOut | None = None
    """What `max_norm` leaves out. `parts.train` is without it, `parts.heldout` is not: both are measured."""
    rows_left_out: int = 0
    """Of those that would count."""

    @property
    def saes(self) -> tuple[SAEConfig, ...]:
        """Of this wave."""
        return self.waves[self.wave - 1]

    @property
    def title(self) -> str:
        """What this part of the run is called."""
        return f"{self.folder.path}" + (f", wave {self.wave} of {len(self.waves)}" if len(self.waves) > 1 else "")

    def in_waves(self, waves: tuple[tuple[SAEConfig, ...], ...]) -> "Job":
        return replace(self, waves=waves)

    def turn(self, wave: int) -> "Job":
        return replace(self, wave=wave)

    @cached_property
    def statistics(self) -> Statistics:
        """What the activations are normalised with: of the store, or of the first segment of one that grows. Waits for
        that segment, and writes it into the run's folder."""
        found = statistics(self.passes.get(0).rows.store, self.hook, self.left_out)
        if not found.scale > 0:
            raise UserError(
                f"{self.store.name}/{self.hook}: all activations are equal, as far as {self.store.spec.dtype} tells "
                "them apart; there is nothing to learn. Where they differ a little about a large mean, harvest with "
                "--set store_dtype=float32"
            )
        return found

    def heldout_store(self, stop_asked: Callable[[], bool]) -> Store:
        """The store with every held-out row that it will have."""
        if not isinstance(self.passes, Segments):
            return self.store
        rows = np.flatnonzero(self.parts.heldout.reshape(-1)[: self.store.spec.n_tokens])
        shards = set((rows // self.store.spec.shard_rows).tolist())
        return self.passes.complete(shards, stop_asked)


def make_job(
    config: TrainConfig,
    device: torch.device,
    leads: bool = True,
    gather: Callable[[list[int]], list[list[int]]] = lambda mine: [mine],
) -> Job:
    """Raises UserError for a store that does not fit the configuration. `leads`: whether this process decides what is
    read next from a store that grows. `gather` gives every rank's value on every rank."""
    store, hook = find_hookpoint(config.store, config.hook)
    check_store(store, config)
    if not config.follow:
        store = store.only(seen_by_all(gather(list(store.commits))))
    limit = norm_limit(store, hook, config)
    massive = left_out(store, hook, limit)
    every = split(store.spec, store.tokens(), config)
    parts = without(every, massive)
    there = np.zeros(parts.train.size, dtype=bool)
    for shard in range(store.spec.n_shards) if config.follow else store.commits:
        there[slice(*store.spec.shard_range(shard))] = True
    heldout_rows = int((parts.heldout.reshape(-1) & there).sum())
    if not heldout_rows:
        raise UserError(f"{store.name}: no held-out context is committed yet. Let sagsae harvest go on, then train")
    epoch_rows = int((parts.train.reshape(-1) & there).sum())
    steps = (config.tokens or epoch_rows) // config.batch
    if steps < 1:
        raise UserError(
            f"{config.tokens or epoch_rows:,} training tokens are less than one batch of {config.batch:,}. "
            "Harvest or ask for more tokens, or lower --batch"
        )
    matmul = matmul_dtype(config.precision, device)
    if (
        config.compile
        and device.type == "cpu"
        and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    ):
        raise UserError("compile = true: there is no C++ compiler here. Install g++, or leave compile off")
    run_chunks = config.run_chunks or (
        max(1, config.window_rows // ROWS_PER_RUN_CHUNK) if is_remote(config.store) else 1
    )
    identity = {
        **config.model_dump(mode="json"),
        "store": store.location,
        "hook": hook,
        "snapshot": following(store) if config.follow else store.snapshot_id,
        "precision": "tf32" if config.precision == "tf32" else str(matmul).removeprefix("torch."),
        "run_chunks": run_chunks,
        "norm_limit": limit,
    }
    folder = RunFolder(config.out or Path("runs") / run_name(store, hook, identity))
    passes, streams = make_passes(config, store, hook, parts, run_chunks, folder.path, leads)
    job = Job(
        config, store, hook, Split(parts.train, every.heldout), passes, streams, steps, epoch_rows, heldout_rows,
        matmul, folder, identity, device.type == "cpu", (config.saes,), left_out=massive,
        rows_left_out=marked(every) - marked(parts),
    )  # fmt: skip
    if not config.follow:
        _ = job.statistics  # raises where there is nothing to learn
    return job


def marked(parts: Split) -> int:
    return int(parts.train.sum() + parts.heldout.sum())


def seen_by_all(shards: list[list[int]]) -> list[int]:
    """Of the shards that each rank found committed. A harvest may commit one while the ranks open its store."""
    everywhere = set.intersection(*map(set, shards))
    return [shard for shard in shards[0] if shard in everywhere]


def check_store(store: Store, config: TrainConfig) -> None:
    if store.state == "final" and store.missing:
        raise DamagedError(f"{store.name}: is final, but shards {store.missing} are not in its manifest")
    if config.follow:
        return
    if not store.commits:
        raise UserError(f"{store.name}: no shard is committed yet. Run sagsae harvest to its end first, or --follow it")
    if store.state != "final":
        say(f"{store.name} is unfinished: training on the {store.n_rows:,} tokens committed so far")


def make_passes(
    config: TrainConfig, store: Store, hook: str, parts: Split, run_chunks: int, folder: Path, leads: bool
) -> tuple[Passes, int]:
    """What is read in each epoch, and in how many streams."""
    layout = store.spec.layouts()[hook]
    unit_rows = run_chunks * layout.chunk_rows
    block_rows = rows_together(layout.dtype.itemsize * layout.row_shape[0], layout.chunk_rows)
    if not config.follow:
        rows = Rows.of(store, hook)
        units = rows.units(run_chunks)
        order = make_order(len(units), unit_rows, config.streams, config.window_rows, config.seed, block_rows)
        return Same(Pass(rows, Kept(rows, parts.train), units, unit_rows, order)), order.streams
    window_units = max(1, config.window_rows // (config.streams * unit_rows))

    def make_pass(part: Store) -> Pass:
        rows = Rows.of(part, hook)
        units = rows.units(run_chunks)
        order = Order(len(units), config.streams, window_units, config.seed, block_rows)
        return Pass(rows, Kept(rows, parts.train), units, unit_rows, order)

    def enough(part: Store) -> bool:
        return part.n_rows >= config.streams * window_units * unit_rows

    return Segments(store, folder, leads, make_pass, enough), config.streams


def following(store: Store) -> str:
    """Stands for a snapshot where all that the store will be is read."""
    return f"follows {store.spec_id}"


def run_name(store: Store, hook: str, identity: dict[str, Any]) -> str:
    """The same command gives the same name; any setting that matters changes it."""
    newer = {"max_norm", "norm_limit"}  # without them a run is called as it was before they existed
    decides = {k: value for k, value in identity.items() if k not in FREE and not (k in newer and value is None)}
    digest = hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{folder_name(store.files)}-{hook.replace('/', '-')}-{digest}"
