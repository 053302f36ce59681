"""Looks at the rows trained on: before the first step, where negative poles begin; after the last one, the thresholds
that give TopK the L0 that was asked for, and which pole of a latent is the first."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shared.saes import SaGsae
from train.data.loader import StorePass
from train.data.rows import to_tensor
from train.fit.member import Member
from train.plan.job import TrainJob
from train.sae.gated import GatedFamily, GatedWeights

ROWS: Final = 1 << 14
SIZES: Final = 1 << 24
"""Sizes that are kept, k for each row: fewer rows for a large k."""
CODES_AT_A_TIME: Final = 1 << 26
FIRST_ROWS: Final = 1 << 13
"""Rows that decide where the negative poles begin."""


@torch.no_grad()
def open_negative_poles(job: TrainJob, member: Member) -> None:
    """Sets, before the first step, the thresholds that `negative_rate` asks for: the same on every rank."""
    mathematics = member.family
    uneven = mathematics.uneven if isinstance(mathematics, GatedFamily) else None
    rate = uneven.negative_rate if uneven else None
    if rate is None:
        return
    assert isinstance(mathematics, GatedFamily)
    assert isinstance(member.weights, GatedWeights)
    threshold = mathematics.first_negative(member.weights, rows_for(job, member, FIRST_ROWS), rate)
    member.weights.theta[1] = member.ranks.gather(threshold)[0]


def rows_for(job: TrainJob, member: Member, wanted: int) -> Sequence[Float[Tensor, "_ d_in"]]:
    """So many rows at unit variance, on the autoencoder's device, a few at a time."""
    rows, at_once = sample(job.passes.get(0), wanted), max(1, CODES_AT_A_TIME // member.config.d_sae)
    return [part.to(member.ranks.device).float() / job.statistics.scale for part in torch.split(rows, at_once)]


def settle(job: TrainJob, member: Member) -> dict[str, Any]:
    """Sets, after the last step, the threshold of an autoencoder whose active latents a batch chose, and makes + the
    pole of a two-sided latent that carries more energy. Returns what its cfg.json says of it."""
    config = member.config
    if isinstance(config, SaGsae) and config.majority_sign and member.family.signed and config.start is None:
        return order_poles(member, rows_for(job, member, ROWS))
    if not member.family.batch_k:
        return {}
    batches = rows_for(job, member, min(ROWS, max(1, SIZES // member.family.batch_k)))
    rows = sum(map(len, batches))
    l0 = member.family.settle_(member.weights, batches, rows)
    return {"threshold_from": {"tokens": rows, "l0": l0}}


def order_poles(member: Member, batches: Sequence[Float[Tensor, "_ d_in"]]) -> dict[str, Any]:
    """Flips the latents whose negative pole carries more energy on these rows."""
    mathematics = member.family
    assert isinstance(mathematics, GatedFamily)
    assert isinstance(member.weights, GatedWeights)
    positive, negative = torch.stack([mathematics.energy(member.weights, x) for x in batches]).sum(0)
    flipped = negative > positive
    mathematics.flip_(member.weights, flipped)
    return {"poles_from": {"tokens": sum(map(len, batches)), "flipped": int(flipped.sum())}}


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
