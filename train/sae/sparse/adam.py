"""Adam's update of a matrix row by row, on a GPU: Triton, from PyTorch's CUDA wheels.

Reads the weights, the gradient and both moments once and writes what changes once. With unit rows, the gradient loses
its radial part before the update and the row gets its norm back after it, in the same pass.
"""

import math
from dataclasses import dataclass
from typing import Final, no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BETA1: Final = 0.9
BETA2: Final = 0.999
EPS: Final = 1e-8


@dataclass(frozen=True)
class AdamUpdate:
    """Update number `step`, from 1, as torch's Adam(0.9, 0.999) has it, in place. All tensors are contiguous, float32
    but for `copy`."""

    weight: Float[Tensor, "d_sae d_in"]
    exp_avg: Float[Tensor, "d_sae d_in"]
    exp_avg_sq: Float[Tensor, "d_sae d_in"]
    copy: Float[Tensor, "d_sae d_in"] | None
    """The weights in the type of matrix products, written with them."""
    lr: float
    step: int
    unit: bool
    """Whether rows are held at norm one."""

    @property
    def copied(self) -> Tensor:
        """Where a copy goes; never written to if there is none."""
        return self.weight if self.copy is None else self.copy

    def scales(self) -> tuple[float, float]:
        return self.lr / (1 - BETA1**self.step), 1 / math.sqrt(1 - BETA2**self.step)


def adam_rows_(grad: Float[Tensor, "d_sae d_in"], update: AdamUpdate) -> None:
    """One program holds a row in registers."""
    height, d_in = grad.shape
    block = triton.next_power_of_2(d_in)
    adam_row[(height,)](
        update.weight,
        grad.contiguous(),
        update.exp_avg,
        update.exp_avg_sq,
        update.copied,
        *update.scales(),
        d_in,
        BETA1=BETA1,
        BETA2=BETA2,
        EPS=EPS,
        UNIT=update.unit,
        COPY=update.copy is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),
    )


@triton.jit
@no_type_check
def updated(g, w, m, v, pace, widen, UNIT: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """A row and its moments after the update by gradient g."""
    if UNIT:
        g -= tl.sum(g * w, 0) * w
    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    w -= pace * m / (tl.sqrt(v) * widen + EPS)
    if UNIT:
        w /= tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-8)
    return w, m, v


@triton.jit(do_not_specialize=["pace", "widen"])
@no_type_check
def adam_row(
    weight, grad, exp_avg, exp_avg_sq, copy, pace, widen, d_in, BETA1: tl.constexpr, BETA2: tl.constexpr,
    EPS: tl.constexpr, UNIT: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < d_in
    place = tl.program_id(0).to(tl.int64) * d_in + column
    w = tl.load(weight + place, mask=inside, other=0.0)
    g = tl.load(grad + place, mask=inside, other=0.0)
    m = tl.load(exp_avg + place, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
    w, m, v = updated(g, w, m, v, pace, widen, UNIT, BETA1, BETA2, EPS)
    tl.store(weight + place, w, mask=inside)
    tl.store(exp_avg + place, m, mask=inside)
    tl.store(exp_avg_sq + place, v, mask=inside)
    if COPY:
        tl.store(copy + place, w.to(copy.dtype.element_ty), mask=inside)
