"""What a training run will do, worked out before anything is written."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.config import TrainConfig
from shared.errors import DamagedError, UserError
from shared.progress import say
from shared.store import Statistics, Store, find_hookpoint
from train.autoencoder import matmul_dtype
from train.folder import FREE, RunFolder
from train.order import Order, Split, make_order, split
from train.stream import Rows


@dataclass(frozen=True)
class Job:
    """A configuration with every question answered, before anything is written."""

    config: TrainConfig
    store: Store
    hook: str
    statistics: Statistics
    parts: Split
    order: Order
    steps: int
    epoch_rows: int
    heldout_rows: int
    matmul: torch.dtype
    folder: RunFolder
    identity: dict[str, Any]


def make_job(config: TrainConfig, device: torch.device) -> Job:
    """Raises UserError for a store that does not fit the configuration."""
    store, hook = find_hookpoint(config.store, config.hook)
    if not store.commits:
        raise UserError(f"{store.root}: no shard is committed yet. Run sagsae harvest to its end first")
    if store.state == "final" and store.missing:
        raise DamagedError(f"{store.root}: is final, but shards {store.missing} are not in its manifest")
    if store.state != "final":
        say(f"{store.root} is unfinished: training on the {store.n_rows:,} tokens committed so far")
    statistics = store.statistics(hook)
    if not statistics.scale > 0:
        raise UserError(f"{store.root}/{hook}: all activations are equal; there is nothing to learn")
    parts = split(store.spec, store.tokens(), config)
    committed = np.zeros(parts.train.size, dtype=bool)
    for commit in store.commits.values():
        committed[commit.start : commit.stop] = True
    heldout_rows = int((parts.heldout.reshape(-1) & committed).sum())
    if not heldout_rows:
        raise UserError(f"{store.root}: no held-out context is committed yet. Let sagsae harvest go on, then train")
    epoch_rows = int((parts.train.reshape(-1) & committed).sum())
    steps = (config.tokens or epoch_rows) // config.batch
    if steps < 1:
        raise UserError(
            f"{config.tokens or epoch_rows:,} training tokens are less than one batch of {config.batch:,}. "
            "Harvest or ask for more tokens, or lower --batch"
        )
    rows = Rows.of(store, hook)
    order = make_order(len(rows.chunks()), store.spec.chunk_rows, config.streams, config.window_rows, config.seed)
    matmul = matmul_dtype(config.precision, device)
    identity = {
        **config.model_dump(mode="json"),
        "store": str(store.root.resolve()),
        "hook": hook,
        "snapshot": store.snapshot_id,
        "precision": str(matmul).removeprefix("torch."),
    }
    folder = RunFolder(config.out or Path("runs") / run_name(store, hook, identity))
    return Job(config, store, hook, statistics, parts, order, steps, epoch_rows, heldout_rows, matmul, folder, identity)


def run_name(store: Store, hook: str, identity: dict[str, Any]) -> str:
    """The same command gives the same name; any setting that matters changes it."""
    decides = {key: value for key, value in identity.items() if key not in FREE}
    digest = hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{store.root.resolve().name}-{hook.replace('/', '-')}-{digest}"
