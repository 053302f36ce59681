"""The last look at the rows trained on: thresholds that give TopK the L0 that was asked for."""

from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from train.data.loader import StorePass
from train.data.rows import to_tensor
from train.fit.member import Member
from train.plan.job import TrainJob

ROWS: Final = 1 << 14
SIZES: Final = 1 << 24
"""Sizes that are kept, k for each row: fewer rows for a large k."""
CODES_AT_A_TIME: Final = 1 << 26


def settle(job: TrainJob, member: Member) -> dict[str, Any]:
    """Sets, after the last step, the threshold of an autoencoder whose active latents a batch chose. Returns what its
    cfg.json says of it; nothing for other architectures."""
    if not member.family.batch_k:
        return {}
    rows = sample(job.passes.get(0), min(ROWS, max(1, SIZES // member.family.batch_k)))
    device, at_once = member.ranks.device, max(1, CODES_AT_A_TIME // member.config.d_sae)
    batches = (part.to(device).float() / job.statistics.scale for part in torch.split(rows, at_once))
    l0 = member.family.settle_(member.weights, batches, len(rows))
    return {"threshold_from": {"tokens": len(rows), "l0": l0}}


def sample(part: StorePass, wanted: int) -> Float[Tensor, "rows d_in"]:
    """So many of the rows trained on, from chunks that are evenly spread over the store; fewer in a small one."""
    rows, chunk_rows = part.rows, part.rows.activations.layout.chunk_rows
    chunks = [(unit.shard, unit.first + chunk) for unit in part.units for chunk in range(unit.count)]
    few = max(1, min(len(chunks), 2 * -(-wanted // chunk_rows)))  # twice as many: some rows are held out
    chosen = [chunks[number * len(chunks) // few] for number in range(few)]
    found, n = [], 0
    for where in chosen:
        found.append(part.kept.values(*where)[: wanted - n])
        n += len(found[-1])
        if n == wanted:
            break
    dtype = "float32" if rows.store.spec.quantised else rows.store.spec.dtype
    return to_tensor(np.concatenate(found), dtype)
