"""What a training run takes of its device's memory, worked out from shapes before it begins.

The autoencoders of a run are trained one after another within a step. Weights and moments of all of them are there all
the time; gradients and activations are there for one at a time, so of these the largest counts. How many activations
[batch, d_sae] each architecture's `gradients` holds at once was measured (`step_memory` in shared/saes.py; a cautious
figure where it was not); tests/train/test_plan.py measures it again.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from shared.config import TrainConfig
from shared.memory import in_words
from shared.saes import SAEConfig, SaGsae, Thresholded
from train.data.loader import FixedSnapshot
from train.data.order import share
from train.plan.job import TrainJob
from train.sae.base import Family
from train.sae.families import family
from train.sae.sparse.open import BLOCK, GPU_BLOCK, has_kernels

FLOAT: Final = 4
ROWS_ALIVE: Final = 6
"""Tensors [batch, d_in] in a step: x - b_dec, the errors, and all of these rounded."""
ROWS_KEPT: Final = 4
"""The same of a recorded step: the batch, x - b_dec rounded, its errors."""
AN_OPEN_ENTRY: Final = {True: 20, False: 15}
"""Numbers of four bytes that the sparse step keeps for an open gate: where it is, in two orders, and what follows. By
whether codes have signs."""
A_BLOCK_ENTRY: Final = 4
"""The same for an entry of the block of u in which open gates are looked for."""
FOR_A_MEAN: Final = 2
"""Copies of an autoencoder's gradients that a mean over the ranks needs: end to end, and that sent round."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes."""

    weights: int = 0
    moments: int = 0
    gradients: int = 0
    activations: int = 0
    """And what else a step makes on its way."""
    reader: int = 0
    """Windows of rows, and the batch."""
    recorded: int = 0
    """What a GPU's recorded steps have on their way: theirs for as long as they may be replayed."""

    @property
    def step(self) -> int:
        return self.gradients + self.activations

    @property
    def total(self) -> int:
        return self.weights + self.moments + self.step + self.reader + self.recorded

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "moments": self.moments,
            "gradients": self.gradients,
            "activations": self.activations,
            "reader": self.reader,
        }
        if self.recorded:
            parts["recorded"] = self.recorded
        return ", ".join(f"{name} {in_words(size)}" for name, size in parts.items())


@dataclass(frozen=True)
class StepConditions:
    """What a step's memory depends on beside the autoencoder."""

    d_in: int
    rows: int
    """Rows of a micro-batch on this rank."""
    rounded: bool = False
    """Whether matrix products are taken in a type of two bytes."""
    sparse: bool = False
    """Whether gated architectures are trained from their open gates alone from the first step on."""
    averaged: bool = False
    """Whether several ranks share each batch."""
    on_cpu: bool = True
    parts: int = 1
    """How often `rows` are computed for one update."""
    kernels: bool = False
    """Whether gated architectures may be trained by Triton kernels."""


def circumstances(job: TrainJob, sweep: bool, ranks: int) -> StepConditions:
    config, d_in = job.config, job.store.spec.hookpoints[job.hook].d_in
    sharing = 1 if sweep else ranks
    parts = config.parts or sharing
    return StepConditions(
        d_in,
        config.batch // parts,
        job.matmul != torch.float32,
        config.step == "sparse",
        parts > 1,
        job.on_cpu,
        parts // sharing,
        config.step != "dense" and not job.on_cpu and has_kernels("cuda", d_in),
    )


def need_of(config: SAEConfig, at: StepConditions) -> MemoryNeed:
    """The memory of one autoencoder, from its first update on."""
    mathematics = family(config)
    sizes = {name: FLOAT * math.prod(shape) for name, shape in mathematics.shapes(at.d_in).items()}
    gradients = sum(size for name, size in sizes.items() if name not in mathematics.weights.KEPT)
    matrix, code = FLOAT * config.d_sae * at.d_in, FLOAT * config.d_sae * at.rows
    sparse = at.sparse and mathematics.sparse_step
    codes, matrices = (sparse_alive(config, at), 0.0) if sparse else config.step_memory(at.rounded)
    during = int(codes * code + matrices * matrix) + ROWS_ALIVE * FLOAT * at.rows * at.d_in
    radial = matrix if mathematics.unit_decoder else 0  # the part that is taken off the decoder's gradient
    after = FOR_A_MEAN * gradients if at.averaged else radial
    kept, recorded = kept_by_kernels(mathematics, at, matrix)
    held = at.parts.bit_length()  # sums of gradients that wait for one more (train/ranks.py, Pairwise)
    return MemoryNeed(
        sum(sizes.values()) + 8 * config.d_sae + kept,
        2 * gradients,
        held * gradients,
        max(during, after),
        recorded=recorded,
    )


def kept_by_kernels(mathematics: Family[Any], at: StepConditions, matrix: int) -> tuple[int, int]:
    """From step to step: both matrices rounded and the rows of a recorded step; and the block of u that is recorded
    ones' on their way. Lists of open entries are small beside these."""
    if not at.kernels or not mathematics.sparse_step:
        return 0, 0
    number = 2 if at.rounded else FLOAT
    block = number * min(mathematics.config.d_sae * at.rows, GPU_BLOCK)
    if at.parts > 1 or at.averaged:  # such steps are not recorded
        return (matrix if at.rounded else 0), 0
    return (matrix if at.rounded else 0) + ROWS_KEPT * FLOAT * at.rows * at.d_in, block


def sparse_alive(config: SAEConfig, at: StepConditions) -> float:
    """The same for the step from open gates alone: as many as are open at first where pre-activations are normal, as
    those of random directions nearly are."""
    assert isinstance(config, Thresholded)
    signed = family(config).signed
    thresholds = [config.theta0]
    if isinstance(config, SaGsae) and signed:
        thresholds.append(config.theta0 * (config.theta0_negative if config.negative_rate is None else 1.0))
    share = sum(0.5 * math.erfc(theta / math.sqrt(2)) for theta in thresholds)
    block = min(config.d_sae * at.rows, BLOCK if at.on_cpu else GPU_BLOCK)
    return AN_OPEN_ENTRY[signed] * share + A_BLOCK_ENTRY * block / (config.d_sae * at.rows)


def together(needs: Iterable[MemoryNeed], reader: int) -> MemoryNeed:
    """The memory of several autoencoders that are trained in turn. Raises ValueError when there is none."""
    needs = list(needs)
    largest = max(needs, key=lambda need: need.step)
    return MemoryNeed(
        sum(need.weights for need in needs),
        sum(need.moments for need in needs),
        largest.gradients,
        largest.activations,
        reader,
        max(need.recorded for need in needs),
    )


def most_streams(batch: int, streams: int, ranks: int) -> int:
    """The largest number of streams that one rank reads, when `ranks` share each batch."""
    return max(len(share(batch, streams, rank, ranks)) for rank in range(ranks))


def reader_bytes(job: TrainJob, rows: int, streams: int) -> int:
    """Two windows of every stream read with the order of their rows, the batch as it is stored, as numbers, and
    scaled."""
    spec = job.store.spec
    layout, d_in = spec.layouts()[job.hook], spec.hookpoints[job.hook].d_in
    unit_rows: int = job.identity["run_chunks"] * layout.chunk_rows
    units = window_units(job, unit_rows)
    row = layout.dtype.itemsize * d_in + FLOAT * (2 if spec.quantised else 1)
    windows: int = 2 * streams * units * (unit_rows * row + (FLOAT * d_in if spec.quantised else 0))
    stored = FLOAT if spec.quantised else layout.dtype.itemsize
    return windows + rows * d_in * (stored + 2 * FLOAT)


def window_units(job: TrainJob, unit_rows: int) -> int:
    """Units of the longest window."""
    if isinstance(job.passes, FixedSnapshot):
        return job.passes.whole.order.longest
    return max(1, job.config.window_rows // (job.streams * unit_rows))


def needs_of(config: TrainConfig, at: StepConditions) -> Mapping[str, MemoryNeed]:
    """By name."""
    return {sae.name: need_of(sae, at) for sae in config.saes}
