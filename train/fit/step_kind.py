"""How an autoencoder's gradients are computed: from every latent, or from open gates alone."""

from enum import Enum
from functools import cache
from typing import Any, Final

from shared.progress import say
from train.sae.base import Family
from train.sae.sparse.open import has_kernels

DECIDE_EVERY: Final = 20
"""Steps between decisions for the sparse or the dense step."""
SPARSE_BELOW: Final = {"cpu": 0.06, "cuda": 0.005}
"""Share of the dictionary that is active, below which the sparse step is faster: on a CPU as measured
(docs/records/benchmarks.md); on CUDA an estimate: on an H200 at 0.2 % it was 2.6 times as fast as the compiled step."""


class StepKind(Enum):
    """What computes a step."""

    DENSE = "every latent"
    SPARSE = "open gates alone, by torch"
    KERNELS = "open gates alone, by Triton kernels"


@cache
def say_no_triton() -> None:
    """Once in a process."""
    say(
        "no triton here: on CUDA `step = auto` stays with the dense step, and `sparse` uses torch's embedding_bag. "
        "PyTorch's own CUDA wheels for Linux bring triton; pip install triton"
    )


def sparse_kind(mathematics: Family[Any], device: str, d_in: int) -> StepKind | None:
    """The step from open gates alone that there is for an architecture on a device; None: there is none."""
    if not mathematics.sparse_step:
        return None
    return StepKind.KERNELS if has_kernels(device, d_in) else StepKind.SPARSE


def allowed_kinds(asked: str, sparse: StepKind | None, device: str) -> tuple[StepKind, ...]:
    """The kinds that the setting `step` allows, the one to begin with first. With two, dense and sparse, training takes
    the faster one, by the share of latents that is active; on CUDA only where there are kernels."""
    if sparse is None or asked == "dense":
        return (StepKind.DENSE,)
    if asked == "sparse":
        return (sparse,)
    return (StepKind.DENSE, sparse) if device == "cpu" or sparse is StepKind.KERNELS else (StepKind.DENSE,)
